// Bars and intervals in plain elements: they wrap, print and speak by themselves.

// rows: [{label, share, low, high, n, note, head}]; marks: [{share, name}] are lines across.
// The axis goes from `from` to 1.
function intervals(rows, marks, pick, from = 0) {
  const wide = share => `${(share / (1 - from) * 100).toFixed(2)}%`, scale = share => wide(share - from);
  const line = row => {
    const label = pick && row.group !== undefined
      ? el("button.link", { type: "button", title: "Show these rows", onclick: () => pick(row.group) }, row.label)
      : el("span", null, row.label);
    const known = has(row.share);
    return el(`div.interval${row.head ? ".all" : ""}`, { role: "listitem" },
      el("div.label", null, label, row.swatch ? el("span.swatch", { style: { "--c": `var(${row.swatch})` } }) : null),
      el("div.track", { "aria-hidden": "true" },
        marks.map(mark => el("span.mark", { style: { left: scale(mark.share) } })),
        known && has(row.low) ? el("span.range", { style: { left: scale(row.low), width: wide(row.high - row.low) } }) : null,
        known ? el("span.dot", { style: { left: scale(row.share) } }) : null),
      el("div.numbers", null, el("b", null, known ? percent(row.share) : "–"),
        el("span", null, known && has(row.low) ? ` ${(row.low * 100).toFixed(1)} – ${(row.high * 100).toFixed(1)}` : ""),
        el("span.of", null, row.note)));
  };
  return el("div.intervals", null,
    el("div", { role: "list" }, rows.map(line)),
    el("div.interval.scale", { "aria-hidden": "true" }, el("div"), el("div.track",
      null, [0, 0.25, 0.5, 0.75, 1].map(at => el("span.tick", { style: { left: `${at * 100}%` } }, `${+((from + at * (1 - from)) * 100).toFixed(1)}`))), el("div")),
    marks.length ? el("p.note", null, "Dashed lines: ", marks.map(mark => `${mark.name} ${percent(mark.share)}`).join(", "), ".") : null);
}

// A bar of parts, each as wide as its share. parts: [{name, n, class}]
function stack(parts, label) {
  const total = parts.reduce((sum, part) => sum + part.n, 0);
  return el("div.stack", { role: "img", "aria-label": `${label}: ${parts.map(p => `${words(p.name)} ${count(p.n)}`).join(", ")}` },
    parts.filter(part => part.n > 0).map(part => el(`span.part.${part.class}`, {
      style: { "flex-grow": part.n }, title: `${words(part.name)}: ${count(part.n)} (${percent(part.n / total)})`,
    })));
}

// Status bars by group. counts: Map group -> Map status -> n
function statusBars(total, counts, pick) {
  const present = STATUSES.filter(name => total.get(name));
  const all = present.reduce((sum, name) => sum + total.get(name), 0);
  const parts = of => present.map(name => ({ name, n: of.get(name) || 0, class: statusClass(name) }));
  return el("div.statuses", null,
    el("div.bar-row.all", null, el("div.label", null, "all"), stack(parts(total), "all"), el("div.numbers", null, count(all))),
    [...counts].map(([group, of]) => el("div.bar-row", null, el("div.label", null, group), stack(parts(of), group),
      el("div.numbers", null, count([...of.values()].reduce((a, b) => a + b, 0))))),
    el("ul.keys", null, present.map(name => {
      const inside = [el("span.swatch", { class: `swatch ${statusClass(name)}` }), words(name), " ", el("b", null, count(total.get(name))),
        " ", el("span.of", null, percent(total.get(name) / all))];
      return el("li", null, pick ? el("button.link", { type: "button", title: "Show these rows", onclick: () => pick(name) }, inside) : inside);
    })));
}
