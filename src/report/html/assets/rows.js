// The table of rows: filtered, searched, sorted, a page at a time.

const PAGE_ROWS = 50;

function rowTable(data) {
  const { words: dictionary, questions: q, samples: s, prompt_start: start, prompt_end: end } = data;
  const n = s.question.length;
  const word = place => has(place) ? dictionary[place] : null;
  const many = s.sample.some(sample => sample > 0);
  const hasGroups = q.group.some(has);
  const hasGold = q.gold.some(has);
  const get = {
    n, many, hasGroups, hasGold,
    id: i => q.id[s.question[i]],
    group: i => word(q.group[s.question[i]]),
    gold: i => q.gold[s.question[i]],
    status: i => word(s.status[i]),
    correct: i => s.correct[i],
    answer: i => s.answer[i],
    note: i => s.notes[i] || {},
    prompt: i => has(q.prompt[s.question[i]]) ? start + q.prompt[s.question[i]] + end : null,
    prompt_tokens: i => s.prompt_tokens[i], analysis_tokens: i => s.analysis_tokens[i],
    final_tokens: i => s.final_tokens[i], output_tokens: i => s.output_tokens[i],
    seconds: i => s.seconds[i], samples: s, rule: i => word(s.rule[i]),
  };
  // Lower-case texts by sample, made at the first search.
  let haystack = null;
  get.matches = (i, needle) => {
    if (!haystack) haystack = new Array(n);
    if (haystack[i] === undefined) {
      const note = get.note(i);
      haystack[i] = [get.id(i), get.group(i), q.prompt[s.question[i]], s.analysis[i], s.final[i], s.answer[i],
        get.gold(i), get.rule(i), note.lenient && note.lenient.answer, note.raw, (note.issues || []).join(" "), note.error && note.error.message]
        .filter(has).join("\n").toLowerCase();
    }
    return haystack[i].includes(needle);
  };
  return get;
}

function rowDetail(get, i) {
  const s = get.samples, note = get.note(i), prompt = get.prompt(i), answer = get.answer(i);
  const marks = has(s.final[i]) ? marked(s.final[i], s.span[i]) : null;
  const rule = get.rule(i), lenient = note.lenient;
  const asked = prompt === null ? null : lastUserTurn(prompt);
  return el("div.row-detail", null,
    note.error ? el("div.alert", { role: "note" }, el("b", null, note.error.message), ` (${note.error.file}, line ${note.error.line}${note.error.field ? `, field ${note.error.field}` : ""}) `, note.error.hint) : null,
    asked === null ? null : passage("Question", asked),
    s.analysis[i] ? passage(lenient && lenient.span ? "Analysis, the part that was read leniently marked" : "Analysis",
      lenient && lenient.span ? marked(s.analysis[i], lenient.span).map(part => typeof part === "string" ? spelled(part) : part) : spelled(s.analysis[i])) : null,
    marks ? passage(has(s.span[i]) ? "Final answer, the part that was read marked" : "Final answer", marks, ".final") : null,
    facts([
      ["Answer", has(answer) ? answer : "none"], ["Expected", get.gold(i)],
      ["Lenient answer", lenient ? [lenient.answer, " ", verdict(lenient.correct)] : null],
      ["Read from", lenient ? `${lenient.channel || "a message without a channel"}${lenient.rule ? `, by the rule ${words(lenient.rule)}` : ""}` : null],
      ["Rule", rule ? words(rule) + (note.rules_disagree ? " (other rules disagree)" : "") : null],
      ["Tokens", `${count(s.prompt_tokens[i])} prompt, ${count(s.analysis_tokens[i])} analysis, ${count(s.final_tokens[i])} final, ${count(s.output_tokens[i])} generated`],
      ["Time in its slot", has(s.seconds[i]) ? duration(s.seconds[i]) : null],
      ["Log-probability", has(s.logprob[i]) ? s.logprob[i].toFixed(4) : null],
      ["Format", (note.issues || []).join("; ")],
    ]),
    el("div.folds", null,
      prompt === null ? null : folded("Whole prompt", () => spelled(prompt)),
      s.analysis[i] || has(s.final[i]) || note.raw ? folded("Raw reply", () => spelled(note.raw || rebuilt(s, i))) : null));
}

function rebuilt(s, i) {
  const final = has(s.final[i]) ? `<|end|><|start|>assistant<|channel|>final<|message|>${s.final[i]}<|return|>` : "";
  return `<|channel|>analysis<|message|>${s.analysis[i]}${final}`;
}

function rowsSection(get, cutBytes) {
  const filter = { status: "", verdict: "", group: "", text: "" };
  const order = { by: null, down: false };
  const open = new Set();
  const columns = [
    { name: "Row", id: "id", text: i => get.id(i), cell: i => [get.id(i), get.many ? el("span.of", null, ` sample ${get.samples.sample[i]}`) : null] },
    { name: "Group", id: "group", class: "wide", text: i => get.group(i) || "", cell: i => get.group(i) || "", skip: !get.hasGroups },
    { name: "Status", id: "status", text: i => STATUSES.indexOf(get.status(i)), cell: i => statusChip(get.status(i)) },
    { name: "Verdict", id: "verdict", text: i => has(get.correct(i)) ? get.correct(i) : 2, cell: i => verdict(get.correct(i)) },
    { name: "Answer", id: "answer", class: "clip", text: i => get.answer(i) || "", cell: i => has(get.answer(i)) ? get.answer(i) : el("span.of", null, get.note(i).lenient ? `none; lenient ${get.note(i).lenient.answer}` : "none") },
    { name: "Expected", id: "gold", class: "clip wide", text: i => get.gold(i) || "", cell: i => get.gold(i) || "", skip: !get.hasGold },
    { name: "Tokens", id: "tokens", class: "number wide", text: i => get.output_tokens(i), cell: i => count(get.output_tokens(i)) },
    { name: "Seconds", id: "seconds", class: "number wide", text: i => get.seconds(i) || 0, cell: i => has(get.seconds(i)) ? get.seconds(i).toFixed(2) : "" },
  ].filter(column => !column.skip);

  const body = el("tbody");
  const found = el("p.found", { role: "status", "aria-live": "polite" });
  const pager = paged(PAGE_ROWS, shown => clear(body).append(...shown.flatMap(rowElements)));

  function rowElements(i) {
    const key = `d${i}`, isOpen = open.has(i);
    const button = el("button.row-open", { type: "button", "aria-expanded": String(isOpen), "aria-controls": key, onclick: event => { event.stopPropagation(); toggle(); } },
      el("span.arrow", { "aria-hidden": "true" }), columns[0].cell(i));
    const line = el("tr.row", { onclick: () => { if (!String(getSelection())) toggle(); } }, el("th", { scope: "row" }, button),
      columns.slice(1).map(column => el("td", { class: column.class }, column.cell(i))));
    const holder = el("td", { colspan: columns.length });
    const detail = el("tr.detail-row", { id: key, hidden: !isOpen }, holder);
    if (isOpen) fill();
    function fill() { if (!holder.hasChildNodes()) holder.append(rowDetail(get, i)); }
    function toggle() {
      detail.hidden = !detail.hidden;
      button.setAttribute("aria-expanded", String(!detail.hidden));
      if (detail.hidden) open.delete(i); else { open.add(i); fill(); }
    }
    return [line, detail];
  }

  function passes(i, needle) {
    if (filter.status && get.status(i) !== filter.status) return false;
    if (filter.group && (get.group(i) || "") !== filter.group.slice(1)) return false;
    switch (filter.verdict) {
      case "correct": if (get.correct(i) !== 1) return false; break;
      case "wrong": if (get.correct(i) !== 0) return false; break;
      case "none": if (has(get.correct(i))) return false; break;
      case "lenient": if (!get.note(i).lenient) return false; break;
      case "disagree": if (!get.note(i).rules_disagree) return false; break;
      case "format": if (!(get.note(i).issues || []).length) return false; break;
    }
    return !needle || get.matches(i, needle);
  }

  function apply() {
    const needle = filter.text.trim().toLowerCase(), list = [];
    for (let i = 0; i < get.n; i += 1) if (passes(i, needle)) list.push(i);
    if (order.by) {
      const { text } = order.by, sign = order.down ? -1 : 1;
      const keys = new Map(list.map(i => [i, text(i)]));
      const collator = new Intl.Collator("en", { numeric: true });
      list.sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        return sign * (typeof x === "number" ? x - y : collator.compare(x, y)) || a - b;
      });
    }
    found.textContent = list.length === get.n ? plural(get.n, get.many ? "sample" : "row") : `${count(list.length)} of ${plural(get.n, get.many ? "sample" : "row")}`;
    reset.hidden = !(filter.status || filter.verdict || filter.group || filter.text);
    empty.hidden = list.length > 0;
    pager.set(list);
  }

  const tally = new Map();
  for (let i = 0; i < get.n; i += 1) tally.set(get.status(i), (tally.get(get.status(i)) || 0) + 1);
  const groups = [...new Set(Array.from({ length: get.n }, (_, i) => get.group(i) || ""))];
  const notes = Object.values(get.samples.notes);
  const status = choice("f-status", "Status", [["", "any"], ...STATUSES.filter(name => tally.has(name)).map(name => [name, `${words(name)} (${count(tally.get(name))})`])], value => { filter.status = value; apply(); });
  const verdicts = choice("f-verdict", "Show", [["", "all"], ["correct", "correct"], ["wrong", "wrong"], ["none", "without gold"],
    ...(notes.some(note => note.lenient) ? [["lenient", "lenient answers alone"]] : []),
    ...(notes.some(note => note.rules_disagree) ? [["disagree", "rules disagree"]] : []),
    ...(notes.some(note => note.issues) ? [["format", "format issues"]] : [])], value => { filter.verdict = value; apply(); });
  const group = choice("f-group", "Group", [["", "any"], ...groups.map(name => [`=${name}`, name || "(none)"])], value => { filter.group = value; apply(); });
  const search = searchField("f-text", "Search", "in prompts, replies, answers, ids", value => { filter.text = value; apply(); });
  const reset = el("button.quiet", { type: "button", onclick: () => set({}) }, "Clear filters");
  const empty = el("p.empty", { hidden: true }, "No row fits these filters.");

  function set({ status: one = "", verdict: two = "", group: three = "", text = "" }) {
    Object.assign(filter, { status: one, verdict: two, group: three, text });
    status.select.value = one; verdicts.select.value = two; group.select.value = three; search.input.value = text;
    apply();
  }

  const headers = columns.map(column => {
    const head = el("th", { scope: "col", class: column.class, "aria-sort": "none" }, el("button.sort", { type: "button", onclick: () => {
      order.down = order.by === column ? !order.down : false;
      order.by = column;
      for (const other of headers) other.setAttribute("aria-sort", other === head ? (order.down ? "descending" : "ascending") : "none");
      apply();
    } }, column.name));
    return head;
  });
  const node = section("rows", "Rows", "Open a row to read the question, the analysis and the final answer.",
    el("form.filters", { role: "search", onsubmit: event => event.preventDefault() },
      search.node, status.node, verdicts.node, get.hasGroups ? group.node : null),
    el("div.above", null, found, reset),
    has(cutBytes) ? el("p.note", null, `The longest texts are cut to ${bytes(cutBytes)} here; results.jsonl and prompts.jsonl hold them whole.`) : null,
    el("div.scroll.rows", null, el("table", null, el("caption.hidden", null, "Rows of the run"), el("thead", null, el("tr", null, headers)), body)),
    empty, pager.nav);
  apply();
  return { node, show(wanted) { set(wanted); node.scrollIntoView({ behavior: "auto", block: "start" }); search.input.focus({ preventScroll: true }); } };
}
