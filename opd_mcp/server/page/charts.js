/* Curves by step, drawn with uPlot. A chart lives as long as its lines stay the same, so that zoom and cursor survive
   the next look at the feed. */
const charts = new Map(),
  options = { smoothing: 0, log: false };
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const AXIS_FONT = "12px system-ui, sans-serif",
  HEIGHT = 220;

/* An exponential mean that is not drawn towards 0 at its start. */
function smoothed(values, weight) {
  let sum = 0,
    norm = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + 1 - weight;
    return sum / norm;
  });
}

/* One table of steps and values for all lines; on a log scale only what is above 0. */
function table(lines) {
  const usable = (values) => (options.log ? values.map((value) => (value > 0 ? value : null)) : values);
  const joined = uPlot.join(lines.map((line) => [line.steps, usable(line.values)]));
  const [steps, ...raw] = joined;
  return [
    steps,
    ...(options.smoothing ? raw.map((values) => smoothed(values, options.smoothing)) : raw),
    ...(options.smoothing ? raw : []),
  ];
}

function series(lines) {
  const line = (index, alpha, width) => ({
    stroke: () => css(`--run${index % MAX_RUNS}`),
    alpha,
    width,
    spanGaps: true,
    points: { show: false },
  });
  const faint = options.smoothing ? lines.map((each) => line(each.index, 0.28, 1)) : [];
  return [{}, ...lines.map((each) => line(each.index, 1, 2)), ...faint];
}

/* Alerts and checkpoints as lines across the plot: solid with a triangle, dashed with a square. */
function drawMarks(marks) {
  return (plot) => {
    const { ctx, bbox } = plot,
      ratio = devicePixelRatio;
    for (const mark of marks) {
      const at = Math.round(plot.valToPos(mark.step, "x", true));
      if (at < bbox.left || at > bbox.left + bbox.width) continue;
      const alert = mark.kind === "alert";
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = css(alert ? "--bad" : "--soft");
      ctx.lineWidth = ratio;
      ctx.setLineDash(alert ? [] : [4 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
      ctx.beginPath();
      if (alert) {
        ctx.moveTo(at - 5 * ratio, bbox.top);
        ctx.lineTo(at + 5 * ratio, bbox.top);
        ctx.lineTo(at, bbox.top + 8 * ratio);
      } else ctx.rect(at - 3 * ratio, bbox.top, 6 * ratio, 6 * ratio);
      ctx.fill();
      ctx.restore();
    }
  };
}

/* Ticks of a log axis stand at every power of ten, and at 2 and 5 times it where there is room. */
const label = (value) => (value === null ? "" : number(value));

function axes() {
  const axis = {
    stroke: () => css("--soft"),
    font: AXIS_FONT,
    grid: { stroke: () => css("--line"), width: 1 },
    ticks: { show: false },
  };
  return [
    {
      ...axis,
      grid: { show: false },
      size: 28,
      values: (_, found) => found.map((at) => (Number.isInteger(at) ? number(at) : "")),
    },
    { ...axis, size: 58, values: (_, found) => found.map(label) },
  ];
}

function plotted(host, lines, marks, phase, onCursor) {
  const plot = new uPlot(
    {
      width: Math.max(host.clientWidth, 100),
      height: HEIGHT,
      padding: [10, 12, 0, 0],
      legend: { show: false },
      scales: { x: { time: false }, y: options.log ? { distr: 3 } : {} },
      cursor: { sync: { key: phase }, drag: { x: true, y: false, setScale: true }, points: { size: 7 } },
      axes: axes(),
      series: series(lines),
      hooks: { draw: [drawMarks(marks)], setCursor: [(self) => onCursor(self.cursor.idx)] },
    },
    table(lines),
    host,
  );
  return plot;
}

/* Arrow keys move the cursor from point to point, + and − zoom around it, 0 and Escape show everything. */
function onKey(plot, event) {
  const [steps] = plot.data,
    last = steps.length - 1,
    at = plot.cursor.idx ?? last;
  const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last };
  if (event.key in moves) {
    const place = Math.min(Math.max(moves[event.key], 0), last);
    const { min, max } = plot.scales.x,
      half = (max - min) / 2;
    if (steps[place] < min || steps[place] > max)
      plot.setScale("x", { min: steps[place] - half, max: steps[place] + half });
    plot.setCursor({ left: plot.valToPos(steps[place], "x"), top: plot.over.clientHeight / 2 });
  } else if (event.key === "+" || event.key === "=" || event.key === "-") {
    const { min, max } = plot.scales.x,
      factor = event.key === "-" ? 2 : 0.5,
      middle = steps[at];
    plot.setScale("x", {
      min: Math.max(middle - (middle - min) * factor, steps[0]),
      max: Math.min(middle + (max - middle) * factor, steps[last]),
    });
  } else if (event.key === "0" || event.key === "Escape") {
    plot.setScale("x", { min: steps[0], max: steps[last] });
  } else return;
  event.preventDefault();
}

class Chart {
  constructor(name) {
    this.key = el("div", { class: "key meta" });
    this.host = el("div", { class: "plot", tabindex: "0", role: "img" });
    this.node = el(
      "div",
      { class: "chart", "data-chart": name },
      el("h3", {}, `${metricName(name)} by step`),
      this.host,
      this.key,
    );
    this.name = name;
    this.host.addEventListener("keydown", (event) => this.plot && onKey(this.plot, event));
    this.host.addEventListener("focus", () => this.key.setAttribute("aria-live", "polite"));
    this.host.addEventListener("blur", () => this.key.removeAttribute("aria-live"));
    new ResizeObserver(() => {
      const width = this.host.clientWidth;
      if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
    }).observe(this.host);
  }

  update(lines, marks) {
    const form = JSON.stringify([options, lines.map((line) => [line.name, line.index]), marks]);
    this.lines = lines;
    this.marks = marks;
    if (this.plot && form === this.form) {
      const { min, max } = this.plot.scales.x,
        [steps] = this.plot.data,
        whole = min <= steps[0] && max >= steps.at(-1);
      this.plot.setData(table(lines), whole);
      if (!whole) this.plot.setScale("x", { min, max });
    } else {
      this.plot?.destroy();
      this.plot = plotted(this.host, lines, marks, this.name.split(".")[0], (place) => this.tell(place));
    }
    this.form = form;
    this.tell(null);
    const ends = lines.map((line) => `${line.name} ${number(line.values.at(-1))} at step ${line.steps.at(-1)}`);
    const keys = "Arrow keys read the points, plus and minus zoom.";
    this.host.setAttribute("aria-label", `${metricName(this.name)}: ${ends.join("; ")}. ${keys}`);
  }

  /* The values at the cursor, else the last ones. */
  tell(place) {
    const step = place === null || place === undefined ? null : this.plot.data[0][place];
    const values = this.lines.map((line) => {
      let near = line.steps.length - 1;
      if (step !== null)
        line.steps.forEach((at, i) => {
          if (Math.abs(at - step) < Math.abs(line.steps[near] - step)) near = i;
        });
      return el(
        "span",
        {},
        dot(line.index),
        `${line.label || ""} ${number(line.values[near])} at step ${number(line.steps[near])}`,
      );
    });
    const alerts = this.marks.map((mark) =>
      el(
        "span",
        { class: mark.kind === "alert" ? "alerted" : null },
        `${mark.kind === "alert" ? "▼" : "■"} ${mark.text} at step ${number(mark.step)}`,
      ),
    );
    this.key.replaceChildren(...values, ...alerts);
  }
}

/* All charts of the chosen runs: by metric one chart, by run (or group) one line. */
function showCharts(runs, indexOf, labelOf) {
  const byKey = new Map();
  for (const run of runs)
    for (const curve of run.curves.filter((each) => each.values.length)) {
      if (!byKey.has(curve.key)) byKey.set(curve.key, { lines: [], marks: [] });
      const found = byKey.get(curve.key),
        phase = curve.key.split(".")[0];
      found.lines.push({ ...curve, index: indexOf(run), name: called(run), label: labelOf(run) });
      if (runs.length === 1) found.marks = (run.detail?.marks || []).filter((mark) => mark.phase === phase);
    }
  byId("curves").hidden = !byKey.size;
  for (const name of [...charts.keys()])
    if (!byKey.has(name)) {
      charts.get(name).plot?.destroy();
      charts.get(name).node.remove();
      charts.delete(name);
    }
  for (const [name, { lines, marks }] of byKey) {
    if (!charts.has(name)) charts.set(name, new Chart(name));
    byId("charts").append(charts.get(name).node);
    charts.get(name).update(lines, marks);
  }
}

function repaintCharts() {
  for (const chart of charts.values()) chart.plot?.redraw(false, true);
}

function redrawCharts() {
  for (const chart of charts.values()) chart.update(chart.lines, chart.marks);
}

function chartTools() {
  const smoothing = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0, "aria-label": "Smoothing" });
  const share = el("span", { class: "note" }, "off");
  smoothing.addEventListener("input", () => {
    options.smoothing = Number(smoothing.value);
    share.textContent = options.smoothing ? options.smoothing.toFixed(2) : "off";
    redrawCharts();
  });
  const log = el("input", { type: "checkbox" });
  log.addEventListener("change", () => {
    options.log = log.checked;
    redrawCharts();
  });
  const whole = el("button", { type: "button" }, "Show all steps");
  whole.addEventListener("click", () =>
    charts.forEach(({ plot }) => plot.setScale("x", { min: plot.data[0][0], max: plot.data[0].at(-1) })),
  );
  byId("tools").replaceChildren(
    el("label", {}, "Smoothing", smoothing, share),
    el("label", {}, log, "Log scale"),
    whole,
    el("span", { class: "note" }, "Drag to zoom, double-click for all."),
  );
}
