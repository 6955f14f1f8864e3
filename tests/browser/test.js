// The pages in a browser: no errors, nothing asked of the network, filters and search, rows that
// open, hostile text that stays text, 20,000 rows, schemes, phone width and print.
//
//     node --test test.js        with PODIUM_PAGES naming the folder that tests/report.rs filled
//
// Screenshots are left in tests/browser/screenshots for a look.

import assert from "node:assert/strict";
import { existsSync, mkdirSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { test } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { withPage } from "./browser.js";

const here = dirname(fileURLToPath(import.meta.url));
const pages = process.env.PODIUM_PAGES;
assert.ok(pages && existsSync(join(pages, "run.html")), "PODIUM_PAGES names the folder with the pages");
const shots = join(here, "screenshots");
mkdirSync(shots, { recursive: true });

const found = page => page.locator(".found").innerText();
const rows = page => page.locator("#rows tr.row");

// Waits for the line that counts what a filter left.
async function until(page, text) {
  await page.waitForFunction(text => document.querySelector(".found").textContent === text, text, { timeout: 5000 });
}

function quiet(seen, file) {
  assert.deepEqual(seen.errors, [], "console");
  assert.deepEqual(seen.dialogs, [], "dialogs");
  assert.deepEqual(seen.requests.filter(url => url !== pathToFileURL(join(pages, file)).href), [], "requests");
}

// No text or control reaches beyond the page's width.
async function fits(page) {
  const [width, shown] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(width <= shown, `${width} px in a window of ${shown}`);
}

test("a run's page filters, searches and opens rows", () => withPage(join(pages, "run.html"), {}, async (page, seen) => {
  for (const id of ["accuracy", "statuses", "tokens", "over-time", "memory", "settings", "rows"]) assert.equal(await page.locator(`#${id} h2`).count(), 1, id);
  assert.equal(await page.locator(".chart canvas").count(), 7, "charts are drawn");
  assert.equal(await page.locator("#accuracy [role=listitem]").count(), 9, "strict, lenient and seven groups");
  assert.equal(await found(page), "500 rows");
  assert.equal(await rows(page).count(), 50, "a page of rows");
  assert.match(await page.locator("#memory").innerText(), /Matrix products by kernel: .*moe_matmul_mxfp4 [\d,]+/);

  await page.getByLabel("Show").selectOption("wrong");
  await until(page, "24 of 500 rows");
  assert.equal(await page.locator("#rows .v-wrong").count(), 24);
  await page.getByLabel("Group").selectOption("=long_products");
  await until(page, "20 of 500 rows");
  await page.getByLabel("Search").fill("mixed-0023");
  await until(page, "1 of 500 rows");

  const open = page.locator(".row-open");
  assert.equal(await open.getAttribute("aria-expanded"), "false");
  await open.focus();
  await page.keyboard.press("Enter");
  assert.equal(await open.getAttribute("aria-expanded"), "true");
  const detail = page.locator(".row-detail");
  assert.match(await detail.innerText(), /Question[\s\S]*Analysis[\s\S]*Final answer/);
  const marked = await detail.locator("mark").innerText();
  assert.equal(marked, await page.locator("#rows tr.row td.clip").first().innerText(), "the answer is marked");
  await detail.getByText("Whole prompt").click();
  // A fold is filled when its toggle event arrives, which is after the click.
  await detail.locator("details[open] pre").filter({ hasText: "<|start|>system<|message|>" }).waitFor({ timeout: 5000 });

  await page.getByRole("button", { name: "Clear filters" }).click();
  await until(page, "500 rows");
  await page.getByRole("button", { name: "Next" }).click();
  assert.equal(await page.locator(".pages").innerText(), "Page 2 of 10");
  await page.getByRole("columnheader", { name: "Tokens" }).getByRole("button").click();
  const tokens = (await page.locator("#rows tr.row td.number:nth-last-child(2)").allInnerTexts()).map(Number);
  assert.deepEqual(tokens, [...tokens].sort((a, b) => a - b), "sorted by number");
  // A group's name in the accuracy chart shows its rows.
  await page.locator("#accuracy").getByRole("button", { name: "sums", exact: true }).click();
  await until(page, "72 of 500 rows");
  quiet(seen, "run.html");
}));

test("a comparison's page shows figures and flips", () => withPage(join(pages, "comparison.html"), {}, async (page, seen) => {
  assert.equal(await page.locator(".pair").count(), 2);
  assert.equal(await page.locator(".two-by-two").count(), 2);
  for (const id of ["difference", "accuracy", "statuses", "speed", "ledger", "flips"]) assert.equal(await page.locator(`#${id} h2`).count(), 1, id);
  assert.match(await page.locator(".pair").first().innerText(), /McNemar, exact[\s\S]*Could detect/);
  const all = Number((await found(page)).match(/of (\d+) changes/)[1]);
  await page.getByLabel("Cause", { exact: true }).selectOption("truncated in one");
  assert.ok(Number((await found(page)).match(/^(\d+) of/)[1]) < all);
  await page.getByLabel("Cause", { exact: true }).selectOption("");
  await page.getByLabel("Show").selectOption("");
  await until(page, `${all} changes`);
  const change = page.locator(".change").first();
  assert.equal(await change.locator(".side").count(), 2, "both texts");
  const read = await change.locator(".side").first().locator(".note b").innerText();
  assert.equal(await change.locator("mark").first().innerText(), read, "the span is counted in characters");
  await page.getByLabel("Search").fill("no such text anywhere");
  await until(page, `0 of ${all} changes`);
  assert.equal(await page.title(), "mixed-16bit-vs-mixed-4bit", "no text ran");
  quiet(seen, "comparison.html");
}));

test("a real comparison shows that a run repeats itself", () => withPage(join(pages, "comparison-nano.html"), {}, async (page, seen) => {
  const again = page.locator(".pair").nth(1);
  assert.match(await again.innerText(), /0\.0 points/);
  assert.match(await again.innerText(), /100\.0 % \(500 of 500\), bit for bit 100\.0 %/);
  await page.screenshot({ path: join(shots, "comparison-nano.png"), fullPage: true });
  quiet(seen, "comparison-nano.html");
}));

test("what a model wrote does not run", () => withPage(join(pages, "run-hostile.html"), {}, async (page, seen) => {
  const title = await page.title();
  assert.match(title, /<script>/, "the run's name is the hostile text");
  await page.locator(".row-open").first().click();
  for (const fold of await page.locator(".row-detail summary").all()) await fold.click();
  await page.getByLabel("Search").fill("onerror");
  await until(page, "60 rows");
  const text = await page.locator("#page").innerText();
  assert.ok(text.includes("</script><script>document.title='hurt'</script>"), "it is there to read");
  assert.equal(await page.locator("#page script, #page img").count(), 0);
  assert.equal(await page.title(), title);
  // The policy stops what our own mistakes might let in.
  await page.evaluate(() => {
    const script = document.createElement("script");
    script.textContent = "document.title = 'hurt'";
    document.body.append(script);
  });
  assert.equal(await page.title(), title);
  assert.ok(seen.errors.every(line => line.includes("Content Security Policy")), seen.errors.join("\n"));
  assert.equal(seen.errors.length, 1);
}));

test("20,000 rows open and filter quickly", () => withPage(join(pages, "run-20000.html"), {}, async (page, seen) => {
  assert.equal(await found(page), "20,000 rows");
  const timed = async work => { const begin = performance.now(); await work(); return Math.round(performance.now() - begin); };
  const filter = await timed(async () => { await page.getByLabel("Show").selectOption("wrong"); await until(page, "960 of 20,000 rows"); });
  await page.getByLabel("Show").selectOption("");
  const first = await timed(async () => { await page.getByLabel("Search").fill("needle in the haystack"); await until(page, "1 of 20,000 rows"); });
  const again = await timed(async () => { await page.getByLabel("Search").fill("mixed-0023"); await until(page, "40 of 20,000 rows"); });
  await page.getByLabel("Search").fill("");
  await until(page, "20,000 rows");
  const sort = await timed(() => page.getByRole("columnheader", { name: "Answer" }).getByRole("button").click());
  const size = statSync(join(pages, "run-20000.html")).size;
  console.log(`20,000 rows: ${(size / 1e6).toFixed(1)} MB, open ${seen.openMs} ms, filter ${filter} ms, first search ${first} ms, next ${again} ms, sort ${sort} ms`);
  // Generous: a slow machine is no failure, a page that hangs is one.
  assert.ok(seen.openMs < 5000 && filter < 2000 && first < 3000 && again < 2000 && sort < 3000);
  quiet(seen, "run-20000.html");
}));

for (const file of ["run.html", "comparison.html"]) {
  const name = file.replace(".html", "");
  for (const size of ["desktop", "phone"]) {
    for (const scheme of ["light", "dark"]) {
      test(`${name} at ${size} width in ${scheme}`, () => withPage(join(pages, file), { size, scheme }, async (page, seen) => {
        await page.waitForTimeout(200);
        await fits(page);
        const background = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
        const bright = Number(background.match(/\d+/)[0]) > 128;
        assert.equal(bright, scheme === "light", background);
        await page.screenshot({ path: join(shots, `${name}-${size}-${scheme}.png`), fullPage: true });
        quiet(seen, file);
      }));
    }
  }
  test(`${name} on paper is light and has no controls`, () => withPage(join(pages, file), { scheme: "dark" }, async (page, seen) => {
    const pdf = await page.pdf({ path: join(shots, `${name}.pdf`), format: "A4" });
    assert.ok(pdf.length > 20_000);
    await page.emulateMedia({ media: "print", colorScheme: "light" });
    await page.screenshot({ path: join(shots, `${name}-print.png`), fullPage: true });
    assert.equal(await page.locator(".filters").isVisible(), false);
    assert.equal(await page.locator("h1").isVisible(), true);
    quiet(seen, file);
  }));
}

test("texts have enough contrast in both schemes", async () => {
  for (const scheme of ["light", "dark"]) {
    await withPage(join(pages, "run.html"), { scheme }, async page => {
      const worst = await page.evaluate(() => {
        const style = getComputedStyle(document.documentElement), read = name => style.getPropertyValue(name).trim();
        const light = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16) / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
          .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const ratio = (a, b) => { const [x, y] = [light(read(a)), light(read(b))].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
        return [["--ink", "--card"], ["--muted", "--card"], ["--muted", "--page"], ["--accent", "--card"], ["--accent", "--page"], ["--good", "--card"], ["--bad", "--card"], ["--mark-ink", "--mark"]]
          .map(([a, b]) => [ratio(a, b), a, b]).sort((p, q) => p[0] - q[0])[0];
      });
      assert.ok(worst[0] >= 4.5, `${scheme}: ${worst}`);
    });
  }
});
