// The page of a comparison: the first run is the base, each other run is set against it.

const data = block("data"), runs = data.runs, base = runs[0];
const RUN_COLORS = ["--c1", "--c2", "--c3", "--no_final", "--malformed", "--not_an_option"];
const runColor = index => RUN_COLORS[index % RUN_COLORS.length];
const runName = run => `${run.label} ${run.precision}`;
const points = difference => has(difference) ? `${difference > 0 ? "+" : difference < 0 ? "−" : ""}${Math.abs(difference * 100).toFixed(1)}` : "";
const pValue = p => !has(p) ? "" : p < 0.0001 ? "< 0.0001" : p > 0.9999 ? "1" : p.toPrecision(p < 0.001 ? 1 : 2);
const swatch = index => el("span.swatch", { style: { "--c": `var(${runColor(index)})` } });
const distinct = values => new Set(values).size;
const KINDS = { lost: "right in base only", gained: "right in other only", neither: "as right as before" };

function verdictOf(pair) {
  const tests = pair.tests;
  if (!has(tests.p)) return "There is nothing to test.";
  if (pair.identity.n_samples > 0 && pair.identity.n_same_tokens === pair.identity.n_samples) return "Every output is the same, token for token.";
  const holm = data.pairs.length > 1 ? ", Holm-adjusted" : "";
  const p = pValue(tests.p_holm), equals = p.startsWith("<") ? "" : "= ";
  return `${tests.significant ? "More than chance explains" : "Chance alone could explain it"} (p ${equals}${p}${holm}).`;
}

function head() {
  return el("header.top", null,
    el("p.kind", null, "podium comparison"),
    el("h1", null, runs.map(run => run.precision).length === distinct(runs.map(run => run.precision))
      ? `${base.precision} against ${runs.slice(1).map(run => run.precision).join(", ")}` : data.name),
    lead([distinct(runs.map(run => run.model)) === 1 ? base.model : null, base.dataset, data.n_questions ? plural(data.n_questions, "question") : null]),
    data.differences.length ? el("div.alert", null, el("b", null, "These runs differ in more than the precision: "),
      data.differences.map(one => `${runs[one.run].label} has ${words(one.key)} ${one.other}, ${base.label} has ${one.base}`).join("; "), ".") : null,
    data.notes.map(note => el("p.alert", null, note)),
    table("Runs", [
      { name: "Run", cell: run => [swatch(runs.indexOf(run)), el("b", null, run.label), " ", run.precision] },
      { name: "Folder", class: "value-cell wide", cell: run => run.name },
      { name: "Device", class: "wide", cell: run => `${run.device}, ${run.numerics}` },
      { name: "Accuracy", class: "number", cell: run => el("b", null, percent(run.accuracy.accuracy)) },
      ...(runs.some(run => run.lenient) ? [{ name: "Lenient", class: "number", cell: run => run.lenient ? percent(run.lenient.accuracy) : "" }] : []),
      { name: "Decode tok/s", class: "number", cell: run => rate(run.speed.decode_tokens_per_s) },
      { name: "Weights", class: "number", cell: run => bytes(run.memory.weights_bytes) },
    ], runs));
}

function pairCard(pair) {
  const other = runs[pair.run], tests = pair.tests, d = pair.difference;
  const found = has(d) ? `${points(d.difference)} points` : "not measured";
  return el("div.card.pair", null,
    el("h3", null, swatch(pair.run), `${runName(other)} against ${runName(base)}`),
    el("p.verdict-line", null, el("span.value", null, found), has(d) ? el("span.of", null, ` 95 % interval ${points(d.low)} to ${points(d.high)}`) : null),
    el("p", null, verdictOf(pair)),
    el("div.pair-body", null,
      pair.table ? twoByTwo(pair.table, other) : el("p.note", null, "With several samples a question there is no two by two table."),
      facts([
        ["Questions", `${count(pair.n_questions)}${excludedText(pair.excluded)}`],
        ["McNemar, exact", has(tests.mcnemar_exact_p) ? `p ${pValue(tests.mcnemar_exact_p)}` : null],
        ["McNemar, mid-p", has(tests.mcnemar_mid_p) ? `p ${pValue(tests.mcnemar_mid_p)}` : null],
        ["Permutation", has(tests.permutation_p) ? `p ${pValue(tests.permutation_p)} (${count(tests.n_permutations)} permutations)` : null],
        ["Clusters", pair.clustered ? `${count(pair.clustered.n_clusters)}, standard error ${(pair.clustered.standard_error * 100).toFixed(2)} points, p ${pValue(pair.clustered.p)}` : null],
        ["Decided by", tests.p_method],
        ["Could detect", pair.detectable ? `${(pair.detectable.difference * 100).toFixed(1)} points at power ${percent(pair.detectable.power, 0)}` : null],
        ["Interval", d ? d.method : null],
        ["Same outputs", has(pair.identity.same_tokens_share) ? `${percent(pair.identity.same_tokens_share)} (${count(pair.identity.n_same_tokens)} of ${count(pair.identity.n_samples)}), bit for bit ${percent(pair.identity.same_bits_share)}` : null],
        ["First difference", has(pair.identity.first_difference_median) ? `token ${count(pair.identity.first_difference_median)} in the median, ${count(pair.identity.first_difference_min)} to ${count(pair.identity.first_difference_max)}` : null],
      ])));
}

function excludedText(excluded) {
  const parts = Object.entries(excluded).filter(([, n]) => n > 0).map(([name, n]) => `${count(n)} ${words(name)}`);
  return parts.length ? `; left out: ${parts.join(", ")}` : "";
}

function twoByTwo(cells, other) {
  const total = cells.both_right + cells.lost + cells.gained + cells.both_wrong;
  const cell = (n, kind, what) => el(`td.cell.${kind}`, null, el("span.value", null, count(n)), el("span.of", null, what));
  return el("table.two-by-two", null, el("caption.hidden", null, "Questions by what became of them in both runs"),
    el("thead", null, el("tr", null, el("td"), el("th", { scope: "col" }, `${other.label} right`), el("th", { scope: "col" }, `${other.label} wrong`))),
    el("tbody", null,
      el("tr", null, el("th", { scope: "row" }, `${base.label} right`), cell(cells.both_right, "same", percent(share(cells.both_right, total))), cell(cells.lost, "lost", "lost")),
      el("tr", null, el("th", { scope: "row" }, `${base.label} wrong`), cell(cells.gained, "gained", "gained"), cell(cells.both_wrong, "same", percent(share(cells.both_wrong, total))))));
}

function accuracySection() {
  const line = (label, accuracy, index, head) => ({ label, share: accuracy.accuracy, low: accuracy.low, high: accuracy.high,
    note: ` ${count(accuracy.n_correct)}/${count(accuracy.n)}`, swatch: runColor(index), head });
  const groups = base.by_group.map(group => group.group);
  const rows = runs.map((run, index) => line(runName(run), run.accuracy, index));
  // Places, not lengths: the axis may begin where the lowest interval does.
  const lowest = Math.min(1, ...runs.flatMap(run => [run.accuracy, ...run.by_group]).map(one => has(one.low) ? one.low : 1));
  const intervalsOf = lines => colored(intervals(lines, [], null, Math.min(0.8, Math.floor(lowest * 10) / 10)), lines);
  return section("accuracy", "Accuracy", "Right answers over all questions that have an expected one and were run, with 95 % Wilson intervals of each run alone. The paired tests above see more than the overlap of these.",
    el("div.card", null, intervalsOf(rows)),
    groups.length ? el("details.card.fold", { open: groups.length <= 12 }, el("summary", null, "By group"), groups.map(group => el("div.group", null, el("h4", null, group),
      intervalsOf(runs.flatMap((run, index) => run.by_group.filter(one => one.group === group).map(one => line(runName(run), one, index))))))) : null);
}

function colored(node, lines) {
  node.querySelectorAll("[role=listitem]").forEach((item, index) => item.style.setProperty("--dot", `var(${lines[index].swatch})`));
  return node;
}

function statusSection() {
  const names = STATUSES.filter(name => runs.some(run => run.statuses[name]));
  const groups = [...new Set(runs.flatMap(run => run.statuses_by_group.map(one => one.group)))];
  const of = (run, group) => group === null ? run.statuses : (run.statuses_by_group.find(one => one.group === group) || { statuses: {} }).statuses;
  const rows = [null, ...groups].flatMap(group => runs.map((run, index) => ({ group, run, first: index === 0, statuses: of(run, group) })));
  const bar = row => stack(names.map(name => ({ name, n: row.statuses[name] || 0, class: statusClass(name) })), `${row.group || "all"}, ${runName(row.run)}`);
  return section("statuses", "Statuses", "What became of every sample, by run and group.", el("div.card", null,
    table("Statuses by group and run", [
      { name: "Group", cell: row => row.first ? el("b", null, row.group === null ? "all" : row.group) : el("span.hidden", null, row.group === null ? "all" : row.group) },
      { name: "Run", cell: row => runName(row.run) },
      { name: "Share", class: "bar-cell", cell: bar },
      ...names.map(name => ({ name: words(name), class: "number", cell: row => row.statuses[name] ? count(row.statuses[name]) : el("span.of", null, "0") })),
    ], rows, row => row.first ? "group-start" : "group-more")));
}

function sideBySide() {
  const ratio = (a, b) => has(a) && has(b) && b > 0 ? `× ${(a / b).toFixed(2)}` : "";
  const lines = [
    ["Prefill, tokens/s", run => run.speed.prefill_tokens_per_s, rate], ["Decode, tokens/s", run => run.speed.decode_tokens_per_s, rate],
    ["Rows a second", run => run.speed.rows_per_s, rate], ["Running time", run => run.speed.wall_seconds, duration],
    ["Slots", run => run.n_slots, count], ["Slot occupancy", run => run.speed.occupancy, percent],
    ["Prompt tokens", run => run.tokens.prompt, count], ["Generated tokens", run => run.tokens.output, count],
    ["Generated a sample", run => run.tokens.output_per_sample, rate], ["Analysis tokens", run => run.tokens.analysis, count], ["Final tokens", run => run.tokens.final, count],
    ["Weights", run => run.memory.weights_bytes, bytes], ["Memory planned", run => run.memory.planned_bytes, bytes],
    ["Memory allocated", run => run.memory.allocated_bytes, bytes], ["Memory measured", run => run.memory.measured_bytes, bytes],
  ].filter(([, get]) => runs.some(run => has(get(run))));
  return section("speed", "Speed, tokens and memory", "Side by side; × is against the base. What was not measured is empty.", el("div.card", null,
    table("Speed, tokens and memory of each run", [
      { name: "", cell: ([name]) => name },
      ...runs.flatMap((run, index) => [
        { name: runName(run), class: "number", cell: ([, get, format]) => format(get(run)) },
        ...(index === 0 ? [] : [{ name: `× ${base.label}`, class: "number of ratio", cell: ([, get]) => ratio(get(run), get(base)) }]),
      ]),
    ], lines)));
}

function ledgerSection() {
  const verdictText = { same: "same values", differ: "values differ", unknown: "not known" };
  return section("ledger", "Ledger", "How each tensor class is held, and whether its values are the base's.", el("div.card", null,
    table("Tensor classes of each run", [
      { name: "Class", cell: one => words(one.class) },
      ...runs.flatMap((run, index) => [
        { name: `${runName(run)}`, cell: one => one.sides[index] ? [one.sides[index].scheme, has(one.sides[index].relative_error) && one.sides[index].relative_error > 0 ? el("span.of", null, ` error ${(one.sides[index].relative_error * 100).toPrecision(2)} %`) : null] : "" },
        { name: "Loaded", class: "number", cell: one => one.sides[index] ? bytes(one.sides[index].loaded_bytes) : "" },
        ...(index === 0 ? [] : [{ name: "Values", class: "nowrap", cell: one => el(`span.values.${one.values[index - 1]}`, null, verdictText[one.values[index - 1]]) }]),
      ]),
    ], data.ledger)));
}

function sideText(run, side, span) {
  return el("div.side", null, el("h4", null, swatch(runs.indexOf(run)), runName(run)),
    el("p.side-head", null, statusChip(side.status), verdict(side.correct), el("span.of", null, plural(side.output_tokens, "token"))),
    has(side.final) ? el("pre", { tabindex: "0" }, marked(side.final, side.span)) : has(side.raw_tail) ? el("pre", { tabindex: "0" }, "… ", spelled(side.raw_tail)) : el("p.note", null, "No text."),
    el("p.note", null, has(side.answer) ? ["Read as ", el("b", null, side.answer), side.rule ? `, by the rule ${words(side.rule)}` : null] : "No answer was read."));
}

function changesSection() {
  const all = data.pairs.flatMap(pair => pair.changes.map(change => ({ pair, change, other: runs[pair.run] })));
  const causes = data.pairs.length === 1 ? data.pairs[0].causes : [];
  if (!all.length) return section("flips", "Flips", null, el("div.card", null, el("p", null, "No sample changed its status, answer or verdict.")));
  const filter = { kind: all.some(one => one.change.direction !== "neither") ? "flips" : "", cause: "", run: "", text: "" };
  const list = el("div.changes"), found = el("p.found", { role: "status", "aria-live": "polite" });
  const empty = el("p.empty", { hidden: true }, "No change fits these filters.");
  const pager = paged(20, shown => clear(list).append(...shown.map(card)));
  function card({ change, other }) {
    return el("article.card.change", null,
      el("header", null, el("b", null, change.key), change.sample > 0 ? el("span.of", null, `sample ${change.sample}`) : null,
        change.group ? el("span.of", null, change.group) : null, el(`span.direction.${change.direction}`, null, change.direction === "neither" ? "no flip" : change.direction),
        el("span.of", null, change.cause), has(change.first_differing_token) ? el("span.of", null, `first differing token ${count(change.first_differing_token)}`) : null),
      change.prompt ? passage("Question", lastUserTurn(change.prompt)) : null,
      has(change.gold) ? el("p.expected", null, "Expected ", el("b", null, change.gold)) : null,
      el("div.sides", null, sideText(base, change.base), sideText(other, change.other)));
  }
  function apply() {
    const needle = filter.text.trim().toLowerCase();
    const kept = all.filter(({ pair, change }) => (filter.run === "" || String(pair.run) === filter.run)
      && (filter.kind === "" || (filter.kind === "flips" ? change.direction !== "neither" : change.direction === filter.kind))
      && (filter.cause === "" || change.cause === filter.cause)
      && (!needle || [change.key, change.group, change.prompt, change.gold, change.base.final, change.other.final, change.base.answer, change.other.answer, change.base.raw_tail, change.other.raw_tail]
        .some(text => has(text) && text.toLowerCase().includes(needle))));
    found.textContent = kept.length === all.length ? plural(all.length, "change") : `${count(kept.length)} of ${plural(all.length, "change")}`;
    empty.hidden = kept.length > 0;
    pager.set(kept);
  }
  const kind = choice("f-kind", "Show", [["flips", "flips"], ["lost", "lost"], ["gained", "gained"], ["neither", "no flip"], ["", "all changes"]], value => { filter.kind = value; apply(); });
  kind.select.value = filter.kind;
  const cause = choice("f-cause", "Cause", [["", "any"], ...[...new Set(all.map(one => one.change.cause))].map(name => [name, name])], value => { filter.cause = value; apply(); });
  const run = choice("f-run", "Run", [["", "any"], ...data.pairs.map(pair => [String(pair.run), runName(runs[pair.run])])], value => { filter.run = value; apply(); });
  const search = searchField("f-text", "Search", "in questions, answers and texts", value => { filter.text = value; apply(); });
  apply();
  return section("flips", "Flips", "Samples whose verdict changed, and others whose answer or status did, with both final texts. The part read as the answer is marked.",
    el("div.card.causes", null, table("Changes by cause", [
      ...(data.pairs.length > 1 ? [{ name: "Run", cell: row => runName(row.other) }] : []),
      { name: "Cause", cell: row => words(row.cause) },
      { name: "Lost", class: "number", cell: row => count(row.lost) }, { name: "Gained", class: "number", cell: row => count(row.gained) },
      { name: "No flip", class: "number", cell: row => count(row.neither) },
    ], data.pairs.flatMap(pair => pair.causes.map(one => ({ ...one, other: runs[pair.run] }))).filter(row => row.lost + row.gained + row.neither > 0))),
    el("form.filters", { role: "search", onsubmit: event => event.preventDefault() }, search.node, kind.node, cause.node, data.pairs.length > 1 ? run.node : null),
    el("div.above", null, found), has(data.cut_bytes) ? el("p.note", null, `The longest texts are cut to ${bytes(data.cut_bytes)} here; comparison.json holds them whole.`) : null,
    list, empty, pager.nav);
}

function groupsSection() {
  const rows = data.pairs.flatMap(pair => pair.by_group.map(group => ({ pair, group, other: runs[pair.run] })));
  if (!rows.length) return null;
  const most = Math.max(...rows.map(row => Math.abs(row.group.difference)), 0.01);
  const bar = difference => el("div.diverging", { "aria-hidden": "true" }, el(`span.${difference < 0 ? "down" : "up"}`, { style: { width: `${Math.abs(difference) / most * 50}%` } }));
  return el("div.card", null, el("h3", null, "Difference by group"), table("Difference by group", [
    ...(data.pairs.length > 1 ? [{ name: "Run", cell: row => runName(row.other) }] : []),
    { name: "Group", cell: row => row.group.group },
    { name: "Questions", class: "number", cell: row => count(row.group.n_questions) },
    { name: runName(base), class: "number", cell: row => percent(row.group.accuracy_base) },
    { name: data.pairs.length > 1 ? "Other" : runName(runs[1]), class: "number", cell: row => percent(row.group.accuracy_other) },
    { name: "Points", class: "number", cell: row => points(row.group.difference) },
    { name: "", class: "bar-cell", cell: row => bar(row.group.difference) },
    { name: "Lost", class: "number", cell: row => count(row.group.lost) }, { name: "Gained", class: "number", cell: row => count(row.group.gained) },
  ], rows));
}

clear(document.getElementById("page")).append(head(), el("main", null,
  section("difference", "Difference", "Paired by question: other less base.", el(`div.grid${data.pairs.length > 1 ? ".pairs" : ""}`, null, data.pairs.map(pairCard)), groupsSection()),
  accuracySection(), statusSection(), sideBySide(), ledgerSection(), changesSection()),
  el("footer", null, `Made by podium ${data.podium_version}; seed ${data.seed} for resampling. This file needs no network.`));
startCharts();
