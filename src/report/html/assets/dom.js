// Elements, figures and colors. Text reaches the page through textContent alone.

const block = id => {
  const found = document.getElementById(id);
  return found ? JSON.parse(found.textContent) : null;
};

// el("td.number", {title: "…"}, child, "text", …): null children are left out.
function el(name, attributes, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter(child => child !== null && child !== undefined && child !== false));
  return node;
}

const clear = node => { node.replaceChildren(); return node; };
const has = value => value !== null && value !== undefined;

// ---- figures, spelled as the terminal spells them

const grouping = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const count = n => has(n) ? grouping.format(n) : "";
const percent = (share, digits = 1) => has(share) ? `${(share * 100).toFixed(digits)} %` : "";
function rate(value) {
  if (!has(value)) return "";
  if (value >= 100) return count(value);
  return value >= 10 ? value.toFixed(1) : value >= 1 ? value.toFixed(2) : value.toFixed(3);
}
function bytes(n) {
  if (!has(n)) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (Math.abs(n) >= 1024 && power < 4) { n /= 1024; power += 1; }
  return `${power === 0 ? n : n.toFixed(power > 2 ? 2 : 1)} ${units[power]}`;
}
function duration(seconds) {
  if (!has(seconds)) return "";
  if (seconds < 10) return `${seconds.toFixed(2)} s`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds), pad = n => String(n).padStart(2, "0");
  return whole < 3600 ? `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`
    : `${Math.floor(whole / 3600)} h ${pad(Math.floor(whole / 60) % 60)} min`;
}
const clock = stamp => has(stamp) ? `${stamp.slice(0, 10)} ${stamp.slice(11, 19)} UTC` : "";
const words = name => String(name).replaceAll("_", " ");
const plural = (n, one, many) => `${count(n)} ${n === 1 ? one : many || one + "s"}`;

// ---- statuses: a name, a class for the color, in the order they are shown

const STATUSES = ["answered", "no_answer", "not_an_option", "truncated_final", "truncated_analysis",
  "no_final", "tool_call", "malformed", "error", "not_run"];
const statusClass = name => STATUSES.includes(name) ? `s-${name}` : "s-other";

const verdictWord = correct => correct === 1 ? "correct" : correct === 0 ? "wrong" : "no gold";
const verdictMark = correct => correct === 1 ? "✓" : correct === 0 ? "✗" : "–";

function statusChip(name) {
  return el(`span.chip.${statusClass(name)}`, null, words(name));
}

function verdict(correct) {
  const word = verdictWord(correct);
  return el(`span.verdict.v-${word.replace(" ", "-")}`, null,
    el("span", { "aria-hidden": "true" }, verdictMark(correct)), el("span.word", null, word));
}

// ---- parts of a page

function section(id, title, note, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` },
    el("div.section-head", null, el("h2", { id: `${id}-title` }, title), note ? el("p.note", null, note) : null),
    ...children);
}

const lead = parts => el("p.lead", null, parts.filter(Boolean).map(part => el("span", null, part)));

function figure(label, value, detail, extra) {
  return el(`div.figure${extra || ""}`, null, el("dt", null, label), el("dd", null,
    el("span.value", null, value), detail ? el("span.detail", null, detail) : null));
}

// columns: [{name, class, cell(row)}]
function table(caption, columns, rows, rowClass) {
  return el("div.scroll", { tabindex: "0", role: "region", "aria-label": caption },
    el("table", null, el("caption.hidden", null, caption),
      el("thead", null, el("tr", null, columns.map(column =>
        el("th", { scope: "col", class: column.class }, column.name)))),
      el("tbody", null, rows.map(row => el("tr", { class: rowClass && rowClass(row) }, columns.map((column, index) =>
        el(index === 0 ? "th" : "td", { scope: index === 0 ? "row" : null, class: column.class },
          column.cell(row))))))));
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
