// Curves and histograms, drawn by uPlot. They are drawn again in the colors of a changed scheme,
// and in light ones for the printer.

const charts = [];

// A card with a chart; `make(width)` gives uPlot's options and data. `words` says the same as the
// picture, for those who do not see it.
function chartCard(title, words, legend, make, height = 220) {
  const canvas = el("div.canvas", { role: "img", "aria-label": `${title}. ${words}` });
  const card = el("figure.card.chart", null,
    el("figcaption", null, el("span.title", null, title), el("span.legend", null,
      (legend || []).map(([name, variable, dashed]) => el("span.key", null,
        el(`span.swatch${dashed ? ".dashed" : ""}`, { style: { "--c": `var(${variable})` } }), name)))),
    canvas, el("p.readout", { "aria-live": "off" }, words));
  charts.push({ canvas, make, height, card, words, plot: null, width: 0 });
  return card;
}

function drawChart(chart, force) {
  const width = Math.floor(chart.canvas.clientWidth);
  if (!width || (!force && width === chart.width)) return;
  chart.width = width;
  if (chart.plot) chart.plot.destroy();
  const { options, data, readout } = chart.make();
  const say = chart.card.querySelector(".readout");
  const hooks = options.hooks || {};
  hooks.setCursor = [plot => {
    const at = plot.cursor.idx;
    say.textContent = has(at) && plot.cursor.left >= 0 && readout ? readout(at) : chart.words;
  }];
  chart.plot = new uPlot({
    width, height: chart.height, legend: { show: false }, padding: [10, 12, 0, 0],
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    ...options, hooks,
  }, data, chart.canvas);
}

function drawAll(force) { for (const chart of charts) drawChart(chart, force); }

function startCharts() {
  drawAll(true);
  new ResizeObserver(() => drawAll(false)).observe(document.getElementById("page"));
  dark.addEventListener("change", () => drawAll(true));
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    drawAll(true);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    drawAll(true);
  });
}

const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

function axis(format, extra) {
  return {
    stroke: color("--muted"), font: FONT, values: (_, ticks) => ticks.map(format),
    grid: { stroke: color("--line"), width: 1 }, ticks: { show: false },
    border: { show: false }, ...extra,
  };
}

const timeText = seconds => seconds === null ? "" : seconds < 60 ? `${+seconds.toFixed(1)} s`
  : seconds < 3600 ? `${+(seconds / 60).toFixed(1)} min` : `${+(seconds / 3600).toFixed(2)} h`;

const timeAxis = () => axis(timeText, { grid: { show: false }, space: 70, size: 28 });

// Ticks at binary multiples, so that they read 64 MiB and not 67.1.
function byteSplits(_, __, low, high) {
  let step = 1;
  while ((high - low) / step > 5) step *= 2;
  const splits = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) splits.push(at);
  return splits;
}

const byteTick = n => n === 0 ? "0" : bytes(n).replace(/\.0+ /, " ");
const shortNumber = n => n === null ? "" : Math.abs(n) >= 1e6 ? `${+(n / 1e6).toFixed(1)}M`
  : Math.abs(n) >= 1e4 ? `${+(n / 1e3).toFixed(0)}k` : Math.abs(n) >= 1e3 ? `${+(n / 1e3).toFixed(1)}k` : `${+n.toFixed(2)}`;

const curve = (variable, extra) => ({ stroke: color(variable), width: 2, spanGaps: false, points: { show: false }, ...extra });

// From 0 to a little above the highest value there is.
const fromZero = (_, __, high) => [0, has(high) && high > 0 ? high * 1.08 : 1];

function timeCurves(seconds, curves, format, readName, extra = {}) {
  return () => {
    const { ticks, splits, top, hooks } = extra;
    const alone = seconds.length < 3;
    return {
      data: [seconds, ...curves.map(one => one.values)],
      options: {
        scales: { x: { time: false, range: (_, low, high) => [Math.min(0, low), high > 0 ? high : 1] },
          y: { range: top ? () => [0, top] : fromZero } },
        series: [{}, ...curves.map(one => curve(one.color, {
          ...(one.dash ? { dash: [5, 4], width: 1.5 } : {}), points: { show: alone, size: 6 },
          ...(one.steps ? { paths: uPlot.paths.stepped({ align: -1 }) } : {}),
        }))],
        axes: [timeAxis(), axis(ticks || format, { size: 62, space: 36, splits })],
        hooks: hooks || {},
      },
      readout: at => `${readName} ${timeText(seconds[at])}: ` + curves.filter(one => has(one.values[at]))
        .map(one => `${one.name} ${format(one.values[at])}`).join(", "),
    };
  };
}

// Equal steps of 1, 2 or 5 times a power of ten, about 30 of them.
function histogram(values, n = 30) {
  const high = values.reduce((a, b) => Math.max(a, b), 0), low = values.reduce((a, b) => Math.min(a, b), high);
  const raw = Math.max((high - low) / n, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(1, [1, 2, 5, 10].map(m => m * power).find(s => s >= raw));
  const first = Math.floor(low / step) * step, bins = Math.floor((high - first) / step) + 1;
  const counts = new Array(bins).fill(0);
  for (const value of values) counts[Math.floor((value - first) / step)] += 1;
  return { starts: counts.map((_, i) => first + i * step), counts, step };
}

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function histogramCard(title, values, variable) {
  const { starts, counts, step } = histogram(values);
  const summary = `median ${count(quantile(values, 0.5))}, 95th percentile ${count(quantile(values, 0.95))}, highest ${count(quantile(values, 1))}`;
  const make = () => ({
    data: [starts.map(start => start + step / 2), counts],
    options: {
      scales: { x: { time: false, range: () => [starts[0], starts[starts.length - 1] + step] }, y: { range: fromZero } },
      series: [{}, { stroke: color(variable), fill: color(variable), width: 0, points: { show: false },
        paths: uPlot.paths.bars({ size: [0.92, 64], radius: 0.08 }) }],
      axes: [axis(shortNumber, { grid: { show: false }, size: 28, space: 44 }), axis(shortNumber, { size: 42, space: 34 })],
    },
    readout: at => `${count(starts[at])}${step > 1 ? ` to ${count(starts[at] + step - 1)}` : ""} tokens: ${plural(counts[at], "sample")}`,
  });
  return chartCard(title, summary, null, make, 160);
}
