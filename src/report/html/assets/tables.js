// Ledger, memory plan, settings, environment and sessions.

const share = (part, whole) => whole > 0 ? part / whole : 0;

function ledgerTable(ledger) {
  const sum = name => ledger.reduce((total, entry) => total + (entry[name] || 0), 0);
  const rows = [...ledger, { class: "total", scheme: "", stored_bytes: sum("stored_bytes"), loaded_bytes: sum("loaded_bytes"), total: true }];
  const known = ["class", "scheme", "stored_bytes", "loaded_bytes", "lossless", "relative_error", "total"];
  const others = [...new Set(ledger.flatMap(Object.keys))].filter(name => !known.includes(name)
    && ledger.some(entry => has(entry[name]) && typeof entry[name] !== "object"));
  const number = (name, cell) => ({ name, class: "number", cell });
  return table("Bytes by tensor class", [
    { name: "Class", cell: entry => words(entry.class) },
    { name: "Held as", cell: entry => entry.scheme },
    number("Stored", entry => bytes(entry.stored_bytes)),
    number("Loaded", entry => bytes(entry.loaded_bytes)),
    { name: "Values", class: "nowrap", cell: entry => entry.total ? "" : entry.lossless === true ? "as stored" : entry.lossless === false
      ? `changed${has(entry.relative_error) ? `, by ${(entry.relative_error * 100).toPrecision(2)} %` : ""}` : "not known" },
    ...others.map(name => number(words(name), entry => has(entry[name]) ? (name.endsWith("_bytes") ? bytes(entry[name]) : String(entry[name])) : "")),
  ], rows, entry => entry.total ? "total" : null);
}

const MEMORY_PARTS = [["weights", "weights_bytes", "m-weights"], ["KV", "kv_bytes", "m-kv"], ["workspace", "workspace_bytes", "m-workspace"]];

function memoryBar(memory) {
  const parts = MEMORY_PARTS.map(([name, field, style]) => ({ name, n: memory[field] || 0, class: style }));
  const total = parts.reduce((sum, part) => sum + part.n, 0);
  return el("div.memory-bar", null,
    el("div.stack", { role: "img", "aria-label": parts.map(part => `${part.name} ${bytes(part.n)}`).join(", ") },
      parts.filter(part => part.n).map(part => el(`span.part.${part.class}`, { style: { "flex-grow": part.n }, title: `${part.name}: ${bytes(part.n)}` }))),
    el("ul.keys", null, parts.map(part => el("li", null, el(`span.swatch.${part.class}`), part.name, " ", el("b", null, bytes(part.n)), " ", el("span.of", null, percent(share(part.n, total)))))));
}

function planFacts(plan, memory) {
  const shape = plan.shape || {};
  return facts([
    ["Planned", has(plan.total_bytes) ? bytes(plan.total_bytes) : null],
    ["Allocated", memory && memory.allocated ? bytes(MEMORY_PARTS.reduce((sum, [, field]) => sum + memory.allocated[field], 0)) : null],
    ["On the GPU, by its driver", memory && has(memory.peak_device_bytes) ? bytes(memory.peak_device_bytes) : null],
    ["Measured growth", memory ? bytes(memory.growth_bytes) : null],
    ["Budget", bytes(plan.budget_bytes)],
    ["Slots", has(shape.n_slots) ? `${count(shape.n_slots)} (batch ${typeof plan.batch === "string" ? plan.batch : "as asked"})` : null],
    ["Context", has(shape.max_context) ? `${count(shape.max_context)} positions` : null],
    ["KV pages", count(shape.n_pages)],
    ["Prefill", has(shape.prefill_rows) ? `${count(shape.prefill_rows)} rows a pass` : null],
  ]);
}

const settingText = value => value === null ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value);

function settingsTable(config) {
  const order = { flag: 0, config: 1, profile: 2, model: 3, default: 4 };
  const rows = Object.entries(config).sort(([a, x], [b, y]) => (order[x.origin] - order[y.origin]) || a.localeCompare(b));
  return el("dl.settings", null, rows.map(([name, setting]) => el("div", null, el("dt", null, el("code", null, name)),
    el("dd", null, settingText(setting.value)), el(`dd.origin.o-${setting.origin}`, null, setting.origin))));
}

function environmentFacts(manifest) {
  const e = manifest.environment;
  return facts([
    ["podium", e.podium_version], ["Command", el("code", null, e.command_line.join(" "))],
    ["CPU", e.cpu_model], ["CPU path", e.cpu_path], ["Threads", has(e.n_threads) ? count(e.n_threads) : null],
    ["Memory limit", bytes(e.memory_limit_bytes)], ["Kernel", e.kernel], ["GPU", e.gpu], ["Driver", e.driver], ["NVRTC", e.nvrtc],
    ["Dataset", manifest.dataset_path], ["Profile", manifest.profile],
    ["Generation", el("code.hash", null, manifest.generation_hash)], ["Scoring", el("code.hash", null, manifest.scoring_hash)],
    ["Dataset content", el("code.hash", null, manifest.generation.dataset)], ["Model", el("code.hash", null, manifest.generation.model)],
  ]);
}

function sessionsTable(sessions) {
  const per = (n, seconds) => n > 0 && seconds > 0 ? rate(n / seconds) : "";
  const number = (name, cell) => ({ name, class: "number", cell });
  return table("Sessions", [
    { name: "Started", cell: session => clock(session.start) },
    { name: "Ended", cell: session => has(session.outcome) ? words(session.outcome) : "running" },
    { name: "Device", cell: session => `${session.device}, ${session.numerics_id}` },
    number("Slots", session => count(session.n_slots)),
    number("Rows", session => count(session.throughput.rows_finished)),
    number("Time", session => duration(session.throughput.wall_seconds)),
    number("Prefill tok/s", session => per(session.throughput.prefill_tokens, session.throughput.prefill_seconds)),
    number("Decode tok/s", session => per(session.throughput.live_row_steps, session.throughput.decode_seconds)),
    number("Peak resident", session => session.memory ? bytes(session.memory.process_peak_bytes) : ""),
  ], sessions);
}
