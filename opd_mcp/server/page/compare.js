/* Several runs: one table, and their curves over each other, coloured by run or by a setting. */
let groupedBy = "";

function groupOf(run, comparison) {
  const row = comparison?.runs.find((each) => each.run_id === run.run_id);
  return groupedBy && row ? `${groupedBy} ${shown(row.settings[groupedBy] ?? "–")}` : called(run);
}

/* The place of a run's colour among the runs, or its group's among the groups. */
function colorsOf(feed) {
  const groups = [...new Set(feed.runs.map((run) => groupOf(run, feed.comparison)))];
  return (run) => groups.indexOf(groupOf(run, feed.comparison));
}

const COLUMNS = { accuracy: "accuracy (95 %)", gain: "gain", reverse_kl: "reverse KL" };

const measured = (comparison) => Object.keys(COLUMNS).filter((name) => comparison.runs.some((row) => row[name]));

function gainFigure(row) {
  if (!row.gain) return "–";
  const [, low, high] = row.gain;
  return [
    figure(row.gain, low > 0 ? "gain" : high < 0 ? "loss" : ""),
    row.baseline ? el("div", { class: "meta" }, `over ${row.baseline}`) : null,
  ];
}

function comparedRow(row, comparison, index) {
  const best = row.run_id === comparison.best,
    [word, kind] = outcome(row, row.verdict);
  const cells = measured(comparison).map((name) =>
    el(
      "td",
      { class: name === "gain" ? null : "figure" },
      name === "gain" ? gainFigure(row) : row[name] ? figure(row[name]) : "–",
    ),
  );
  const open = el("button", { type: "button", class: "plain", title: "Open it alone" }, called(row));
  open.addEventListener("click", () => choose([row.run_id]));
  return el(
    "tr",
    {},
    el(
      "td",
      { class: best ? "long best" : "long" },
      el("span", { class: "named" }, dot(index), open),
      best ? " best" : "",
    ),
    el("td", {}, el("span", { class: `word ${kind}` }, word)),
    cells,
    el("td", { class: "value" }, duration(row.seconds)),
    comparison.settings.map((key) => el("td", { class: "long" }, shown(row.settings[key] ?? "–"))),
  );
}

function comparisonCard(feed) {
  const comparison = feed.comparison,
    indexOf = colorsOf(feed);
  const heads = [
    "run",
    "verdict",
    ...measured(comparison).map((name) => COLUMNS[name]),
    "time",
    ...comparison.settings,
  ];
  const name = (id) => called(comparison.runs.find((row) => row.run_id === id) || { run_id: id });
  const paired = comparison.paired.map((pair) =>
    el(
      "p",
      { class: "meta" },
      `Accuracy of ${name(pair.candidate)} minus ${name(pair.baseline)}: `,
      figure(pair.accuracy_difference),
      ` on ${pair.prompts} prompts`,
    ),
  );
  return card(
    `${comparison.runs.length} runs compared`,
    el(
      "div",
      { class: "scroll compared", tabindex: "0", role: "region", "aria-label": "The runs in a table" },
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            heads.map((head) => el("th", {}, head)),
          ),
        ),
        el(
          "tbody",
          {},
          comparison.runs.map((row) => comparedRow(row, comparison, indexOf(row))),
        ),
      ),
    ),
    grouping(comparison),
    arms(comparison.arms || []),
    paired,
    comparison.notes.map((note) => el("p", { class: "meta" }, note)),
  );
}

/* What was asked for, set against its baselines over all seeds. */
function arms(found) {
  if (!found.length) return null;
  const heads = ["arm", "runs", "accuracy", "reverse KL", "time", "asked minus it, accuracy", "asked minus it, KL"];
  const cells = (arm) => [
    arm.arm,
    arm.runs,
    figure(arm.accuracy),
    figure(arm.reverse_kl),
    duration(arm.seconds),
    arm.gain ? figure(arm.gain) : "–",
    arm.kl_change ? figure(arm.kl_change) : "–",
  ];
  const row = (tag, values) => el("tr", {}, ...values.map((value) => el(tag, {}, value)));
  const rows = found.map((arm) => row("td", cells(arm)));
  const table = el("table", {}, el("thead", {}, row("th", heads)), el("tbody", {}, rows));
  return [el("h3", { class: "links" }, "Arms, means over their runs"), el("div", { class: "scroll" }, table)];
}

function grouping(comparison) {
  if (!comparison.settings.length) return null;
  const select = el(
    "select",
    { "aria-label": "Colour the curves by" },
    el("option", { value: "" }, "run"),
    comparison.settings.map((key) => el("option", { value: key }, key)),
  );
  select.value = comparison.settings.includes(groupedBy) ? groupedBy : "";
  select.addEventListener("change", () => {
    groupedBy = select.value;
    redraw();
  });
  return el("div", { class: "row links" }, el("label", { class: "row" }, "Colour the curves by ", select));
}
