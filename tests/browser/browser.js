// Opens pages of files in headless Chromium, with a new empty profile each time, and keeps what the
// console said and what was asked of the network.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const executablePath = process.env.PODIUM_CHROMIUM || "/usr/bin/chromium";

const args = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync"];

export const sizes = { desktop: { width: 1280, height: 900 }, phone: { width: 390, height: 844 } };

// Runs `visit(page, seen)` on a file. `seen` holds console errors, page errors and requests.
export async function withPage(file, { size = "desktop", scheme = "light" }, visit) {
  const profile = mkdtempSync(join(tmpdir(), "podium-browser-"));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath, headless: true, args, viewport: sizes[size], colorScheme: scheme,
    deviceScaleFactor: size === "phone" ? 2 : 1, isMobile: size === "phone", hasTouch: size === "phone", offline: true,
  });
  try {
    const page = await context.newPage();
    const seen = { errors: [], requests: [], dialogs: [] };
    page.on("console", message => { if (["error", "warning"].includes(message.type())) seen.errors.push(message.text()); });
    page.on("pageerror", error => seen.errors.push(String(error)));
    page.on("request", request => seen.requests.push(request.url()));
    page.on("dialog", dialog => { seen.dialogs.push(dialog.message()); dialog.dismiss(); });
    const begin = performance.now();
    await page.goto(pathToFileURL(file).href, { waitUntil: "load" });
    await page.waitForSelector("h1");
    seen.openMs = Math.round(performance.now() - begin);
    return await visit(page, seen);
  } finally {
    await context.close();
    rmSync(profile, { recursive: true, force: true });
  }
}
