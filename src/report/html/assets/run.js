// The page of one run.

const data = block("data"), manifest = data.manifest, summary = data.summary;
const rowData = block("rows"), get = rowTable(rowData);

const OUTCOMES = { complete: "complete", stopped: "stopped, not complete", time_limit: "time limit reached, not complete",
  failed: "failed, not complete", killed: "killed, not complete" };

function head() {
  const tally = summary.tally, memory = summary.memory || {}, load = summary.device_load || {};
  const lenient = tally && tally.lenient;
  const measured = memory.on_device ? memory.peak_device_bytes : memory.growth_bytes;
  return el("header.top", null,
    el("p.kind", null, "podium run"),
    el("h1", null, manifest.name),
    lead([summary.model, summary.precision, summary.device ? `${summary.device} (${summary.numerics_id})` : null,
      plural(manifest.n_rows, "row"), manifest.sessions.length ? clock(manifest.sessions[0].start) : null,
      has(summary.outcome) ? OUTCOMES[summary.outcome] : "running"]),
    data.verdicts_are_the_logs ? el("p.alert", null, "scores.csv is not of these rows; verdicts are as they were logged.") : null,
    el("dl.figures", null,
      tally && has(tally.accuracy.accuracy) ? figure("Accuracy", percent(tally.accuracy.accuracy),
        `${(tally.accuracy.low * 100).toFixed(1)} – ${(tally.accuracy.high * 100).toFixed(1)} % · ${count(tally.accuracy.n_correct)} of ${count(tally.accuracy.n)}`, ".main") : null,
      lenient ? figure("Lenient accuracy", percent(lenient.accuracy), `${count(lenient.n_gained)} of ${count(lenient.n_unanswered)} unanswered right`) : null,
      tally ? figure("Answered", percent(share(tally.statuses.answered || 0, tally.n_samples)), `${count(tally.statuses.answered || 0)} of ${plural(tally.n_samples, "sample")}`) : null,
      has(summary.decode_tokens_per_s) ? figure("Decode", rate(summary.decode_tokens_per_s), `tokens/s · ${count(summary.totals.live_row_steps)} tokens`) : null,
      has(summary.prefill_tokens_per_s) ? figure("Prefill", rate(summary.prefill_tokens_per_s), `tokens/s · ${count(summary.totals.prefill_tokens)} + ${count(summary.totals.reused_prefix_tokens)} reused`) : null,
      has(summary.rows_per_s) ? figure("Rows", rate(summary.rows_per_s), `a second · ${duration(summary.totals.wall_seconds)}`) : null,
      has(measured) ? figure("Memory", bytes(measured), `measured · ${memory.planned ? `${bytes(MEMORY_PARTS.reduce((sum, [, field]) => sum + memory.planned[field], 0))} planned` : ""}`) : null,
      has(load.power_watts) ? figure("GPU power", `${Math.round(load.power_watts)} W`, `mean${has(load.utilization) ? ` · busy ${percent(load.utilization)}` : ""}`) : null),
    el("nav.contents", { "aria-label": "Contents" }, [["accuracy", "Accuracy"], ["statuses", "Statuses"], ["tokens", "Tokens"],
      ["over-time", "Over time"], ["memory", "Memory"], ["settings", "Settings"], ["rows", "Rows"]].map(([id, name]) =>
      el("button.link", { type: "button", onclick: () => document.getElementById(id).scrollIntoView() }, name))));
}

function accuracySection(pick) {
  const tally = summary.tally;
  if (!tally) return section("accuracy", "Accuracy", "No session has ended yet.");
  if (!has(tally.accuracy.accuracy)) return section("accuracy", "Accuracy", "The data set has no expected answers, or no row was run.");
  const row = (label, accuracy, extra) => ({ label, share: accuracy.accuracy, low: accuracy.low, high: accuracy.high,
    note: ` ${count(accuracy.n_correct)}/${count(accuracy.n)}`, ...extra });
  const marks = [["most frequent answer", tally.majority_baseline], ["by chance", tally.random_baseline]]
    .filter(([, value]) => has(value)).map(([name, value]) => ({ name, share: value }));
  const all = tally.lenient
    ? [row("all, strict", tally.accuracy, { head: true }), row("all, lenient", tally.lenient, { head: true })]
    : [row("all", tally.accuracy, { head: true })];
  return section("accuracy", "Accuracy", `Right answers over all questions that have an expected one and were run, with 95 % Wilson intervals.${tally.lenient
    ? " The lenient figure also counts an answer that a reply states outside a finished final message; groups are strict." : ""}`,
    el("div.card", null, intervals([...all,
      ...tally.by_group.map(group => row(group.group, group, { group: group.group === "(none)" ? "" : group.group }))], marks, pick)));
}

function statusSection(pick) {
  const total = new Map(), groups = new Map();
  for (let i = 0; i < get.n; i += 1) {
    const status = get.status(i), group = get.group(i) || "(none)";
    total.set(status, (total.get(status) || 0) + 1);
    if (!groups.has(group)) groups.set(group, new Map());
    groups.get(group).set(status, (groups.get(group).get(status) || 0) + 1);
  }
  return section("statuses", "Statuses", "What became of every sample. None is left out.",
    el("div.card", null, statusBars(total, get.hasGroups ? groups : new Map(), pick)));
}

function tokensSection() {
  const ran = Array.from({ length: get.n }, (_, i) => i).filter(i => get.output_tokens(i) > 0);
  const cards = [["Analysis tokens", "analysis_tokens", "--c1"], ["Final tokens", "final_tokens", "--c2"], ["Prompt tokens", "prompt_tokens", "--c3"]]
    .filter(() => ran.length > 0).map(([title, name, variable]) => histogramCard(title, ran.map(get[name]), variable));
  return section("tokens", "Tokens", cards.length ? "Samples by length, of those that ran." : "No sample has run.", el("div.grid.three", null, cards));
}

function timeSection() {
  const memory = data.memory, speed = data.speed, cards = [];
  if (speed.seconds.length) {
    const one = (title, name, variable) => chartCard(title, `${rate(summary[name])} tokens/s over the whole run`, null,
      timeCurves(speed.seconds, [{ name: "", values: speed[name], color: variable }], value => `${rate(value)}`, "to", { ticks: shortNumber }));
    cards.push(one("Decode, tokens/s of live rows", "decode_tokens_per_s", "--c1"), one("Prefill, tokens/s", "prefill_tokens_per_s", "--c2"));
    cards.push(chartCard("Slot occupancy", `${percent(summary.occupancy)} of row-steps were live`, null,
      timeCurves(speed.seconds, [{ name: "", values: speed.occupancy, color: "--c3", steps: true }], value => percent(value, 0), "to", { top: 1.04, splits: () => [0, 0.25, 0.5, 0.75, 1] })));
  }
  if (memory.seconds.length) cards.push(memoryCard(memory));
  return section("over-time", "Over time", cards.length
    ? `Running time of all sessions; time between them is left out.${speed.n_batches > speed.seconds.length ? ` ${count(speed.n_batches)} batches, several to a point.` : ""}`
    : "This run's folder has no measurements over time.", el("div.grid.two", null, cards));
}

function memoryCard(memory) {
  const planned = summary.memory && summary.memory.planned ? MEMORY_PARTS.reduce((sum, [, field]) => sum + summary.memory.planned[field], 0) : null;
  const curves = [
    { name: "device", values: memory.device_bytes, color: "--c3" },
    { name: "anonymous", values: memory.anonymous_bytes, color: "--c1" },
    { name: "file-backed", values: memory.file_bytes, color: "--c2" },
    { name: "planned", values: memory.seconds.map(() => planned), color: "--muted", dash: true },
  ].filter(one => one.values.some(has));
  // The events stand as thin lines with their names.
  const draw = plot => {
    const { ctx, bbox } = plot, ratio = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = color("--muted");
    ctx.font = FONT.replace("12px", `${11 * ratio}px`);
    ctx.lineWidth = ratio;
    let free = -Infinity, lane = 0;
    for (const { seconds, event } of memory.events) {
      if (event === "start") continue;
      const x = plot.valToPos(seconds, "x", true), name = words(event);
      lane = x < free ? lane + 1 : 0;
      const right = x + ctx.measureText(name).width + 8 * ratio > bbox.left + bbox.width;
      free = x + ctx.measureText(name).width + 12 * ratio;
      ctx.globalAlpha = 0.45;
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
      ctx.globalAlpha = 1;
      ctx.textAlign = right ? "right" : "left";
      // A rim in the card's color keeps the name readable where a curve runs through it.
      ctx.strokeStyle = color("--card"); ctx.lineWidth = 4 * ratio; ctx.lineJoin = "round";
      ctx.strokeText(name, x + (right ? -4 : 4) * ratio, bbox.top + bbox.height - (8 + 14 * (lane % 4)) * ratio);
      ctx.strokeStyle = color("--muted"); ctx.lineWidth = ratio;
      ctx.fillText(name, x + (right ? -4 : 4) * ratio, bbox.top + bbox.height - (8 + 14 * (lane % 4)) * ratio);
    }
    ctx.restore();
  };
  const peak = summary.memory;
  const say = peak ? `peak ${bytes(peak.peak_anonymous_bytes)} anonymous, ${bytes(peak.process_peak_bytes)} resident in all` : "";
  return chartCard("Memory of the process", say, curves.map(one => [one.name, one.color, one.dash]),
    timeCurves(memory.seconds, curves, bytes, "at", { ticks: byteTick, splits: byteSplits, hooks: { draw: [draw] } }));
}

// The kernels that multiplied weights, by their own count: what ran, not what was asked for.
function kernelNote() {
  const calls = new Map();
  for (const session of manifest.sessions) {
    for (const [name, n] of Object.entries(session.kernel_calls || {})) calls.set(name, (calls.get(name) || 0) + n);
  }
  if (!calls.size) return null;
  return el("p.note", null, `Matrix products by kernel: ${[...calls].map(([name, n]) => `${name} ${count(n)}`).join(", ")}.`);
}

function memorySection() {
  const plan = manifest.memory_plan || {}, ledger = manifest.ledger || [];
  return section("memory", "Ledger and memory plan", "Bytes of the weights as the checkpoint stores them and as they are held, and all that was allocated.",
    el("div.grid.two", null,
      el("div.card", null, el("h3", null, "Weights by tensor class"), ledger.length ? ledgerTable(ledger) : el("p.note", null, "The run has no ledger."), kernelNote()),
      el("div.card", null, el("h3", null, "Memory plan"), plan.memory ? memoryBar(plan.memory) : null, planFacts(plan, summary.memory))));
}

function settingsSection() {
  return section("settings", "Settings and environment", "Every effective value and where it came from.",
    el("div.card", null, el("h3", null, "Settings"), settingsTable(manifest.config)),
    el("div.card", null, el("h3", null, "Environment"), el("div.columns", null, environmentFacts(manifest))),
    el("div.card", null, el("h3", null, "Sessions"), sessionsTable(manifest.sessions)));
}

const rows = rowsSection(get, rowData.cut_bytes);
clear(document.getElementById("page")).append(head(), el("main", null,
  accuracySection(group => rows.show({ group: `=${group}` })), statusSection(status => rows.show({ status })),
  tokensSection(), timeSection(), memorySection(), settingsSection(), rows.node),
  el("footer", null, `Made by podium ${manifest.environment.podium_version}. This file needs no network.`));
startCharts();
