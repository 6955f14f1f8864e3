// What a model was asked and what it wrote, as text.

const SPECIAL = /<\|(?:start|end|message|channel|constrain|return|call|startoftext|endoftext|refusal|untrusted|end_untrusted|reserved_\d+)\|>/g;

// Text with its special tokens set off.
function spelled(text) {
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(SPECIAL)) {
    parts.push(text.slice(at, match.index), el("span.token", null, match[0]));
    at = match.index + match[0].length;
  }
  parts.push(text.slice(at));
  return parts;
}

// The last turn of the user, which is the question; the whole text where there is none.
function lastUserTurn(prompt) {
  const start = prompt.lastIndexOf("<|start|>user<|message|>");
  if (start < 0) return prompt;
  const body = prompt.slice(start + "<|start|>user<|message|>".length);
  const end = body.lastIndexOf("<|end|>");
  return end < 0 ? body : body.slice(0, end);
}

// Text with the answer's span marked; `span` in UTF-16 units.
function marked(text, span) {
  if (!span) return [text];
  return [text.slice(0, span[0]), el("mark", { title: "read as the answer" }, text.slice(span[0], span[1])), text.slice(span[1])];
}

function passage(title, content, extra) {
  return el(`div.passage${extra || ""}`, null, el("h4", null, title),
    el("pre", { tabindex: "0" }, content));
}

function folded(title, makeContent) {
  const body = el("pre", { tabindex: "0" });
  const details = el("details", null, el("summary", null, title), body);
  details.addEventListener("toggle", () => {
    if (details.open && !body.hasChildNodes()) body.append(...[makeContent()].flat(9));
  });
  return details;
}

function facts(pairs) {
  return el("dl.facts", null, pairs.filter(([, value]) => has(value) && value !== "").map(([name, value]) =>
    el("div", null, el("dt", null, name), el("dd", null, value))));
}

// A list in pages: `show(items)` fills the body. Gives the pager and a way to put in other items.
function paged(size, show) {
  let items = [], page = 0;
  const status = el("span.pages", { "aria-live": "polite" });
  const turn = (name, by) => el("button", { type: "button", onclick: () => { page += by(); draw(); } }, name);
  const pages = () => Math.max(1, Math.ceil(items.length / size));
  const first = turn("First", () => -page), back = turn("Back", () => -1);
  const next = turn("Next", () => 1), last = turn("Last", () => pages() - 1 - page);
  function draw() {
    first.disabled = back.disabled = page === 0;
    next.disabled = last.disabled = page >= pages() - 1;
    nav.hidden = pages() < 2;
    status.textContent = `Page ${count(page + 1)} of ${count(pages())}`;
    show(items.slice(page * size, (page + 1) * size));
  }
  const nav = el("nav.pager", { "aria-label": "Pages" }, first, back, status, next, last);
  return { nav, set(list) { items = list; page = 0; draw(); }, draw };
}

function choice(id, label, options, onchange) {
  const select = el("select", { id, onchange: () => onchange(select.value) },
    options.map(([value, name]) => el("option", { value }, name)));
  return { node: el("div.field", null, el("label", { for: id }, label), select), select };
}

function searchField(id, label, placeholder, oninput) {
  let waiting = 0;
  const input = el("input", { id, type: "search", placeholder, autocomplete: "off", spellcheck: "false",
    oninput: () => { clearTimeout(waiting); waiting = setTimeout(() => oninput(input.value), 120); } });
  return { node: el("div.field.grow", null, el("label", { for: id }, label), input), input };
}
