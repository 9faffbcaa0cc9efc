/* Builders of elements and words. Text goes in as text, so that no name or message of a run can become markup. */
const MAX_RUNS = 8,
  ACTIVE = new Set(["queued", "running"]);
const byId = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function svg(tag, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/* A part of the page is built again only when what it shows has changed: focus, selection and open details stay. */
const drawn = new Map();
function show(id, data, build) {
  const text = JSON.stringify(data);
  if (drawn.get(id) === text) return;
  drawn.set(id, text);
  const open = new Set([...byId(id).querySelectorAll("details[open]")].map((each) => each.dataset.key));
  byId(id).replaceChildren(...[build()].flat().filter(Boolean));
  for (const each of byId(id).querySelectorAll("details")) each.open = open.has(each.dataset.key);
}

const card = (heading, ...children) =>
  el("section", { class: "card" }, heading ? el("h2", {}, heading) : null, ...children);
const color = (index) => `var(--run${index % MAX_RUNS})`;
const dot = (index) => el("span", { class: "dot", style: `background:${color(index)}`, "aria-hidden": "true" });
const words = (name) => name.replaceAll("_", " ").replaceAll(".", ": ");
const METRICS = {
  reverse_kl_k1: "reverse KL (k1)",
  reverse_kl_k3: "reverse KL (k3)",
  reverse_kl: "reverse KL",
  held_out_reverse_kl: "reverse KL on fresh samples, held out",
  held_out_accuracy: "accuracy, held out",
  mean_logprob: "mean log-prob",
};
const metricName = (key) =>
  key
    .split(".")
    .map((part) => METRICS[part] || words(part))
    .join(": ");
const judged = (judgement) => (judgement === "unknown" ? "verdict unknown" : judgement.replaceAll("_", " "));
/* What is red: a loss, or no gain for a cause that was found. */
const isBad = (verdict) =>
  Boolean(verdict && (verdict.judgement === "worse" || (verdict.judgement !== "better" && verdict.cause)));
/* What a run came to, in a word and its colour: a training that nothing measured is no success to rely on. */
function outcome(run, judgement) {
  if (judgement) return [judged(judgement), judgement];
  const unmeasured = run.state === "succeeded" && ["sft", "distill"].includes(run.kind);
  return unmeasured ? ["not measured", "unknown"] : [run.state, run.state];
}
const called = (run) => run.name || run.run_id;

function number(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (Math.abs(value) < 1e-9) return "0";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

function duration(seconds) {
  if (typeof seconds !== "number") return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function when(time) {
  const date = new Date(time);
  return Number.isNaN(date.getTime())
    ? String(time)
    : date.toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
}

/* A value with its interval. */
function figure(value, kind = "") {
  const [middle, low, high] = Array.isArray(value) ? value : [value];
  const interval = low === undefined ? null : el("small", {}, ` ${number(low)} to ${number(high)}`);
  return el(
    "span",
    { class: "figure" },
    el("span", { class: kind || null }, number(middle)),
    interval,
    kind === "loss" ? el("span", { class: kind }, " worse") : null,
  );
}

const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));
