/* One run in full: verdict, gain, phases with log, costs against the plan, settings. */
function stateChip(run) {
  const judgement = run.verdict?.judgement;
  return el(
    "span",
    { class: `state ${run.state} ${judgement || ""} ${isBad(run.verdict) ? "bad" : ""}` },
    judgement ? `${run.state} · ${judged(judgement)}` : run.state,
  );
}

function verdict(run) {
  const found = run.verdict;
  if (!found) return null;
  return el(
    "div",
    { class: `verdict ${found.judgement} ${isBad(found) ? "bad" : ""}` },
    el("b", {}, judged(found.judgement)),
    `: ${found.sentence}`,
    found.cause ? el("p", {}, `Cause: ${found.cause}`) : null,
    found.next_action?.why ? el("p", { class: "meta" }, `Next: ${found.next_action.why}`) : null,
  );
}

function links(run) {
  const found = (run.detail?.documents || []).map((each) => documentLink(run, each));
  if (run.detail?.export) found.push(el("span", {}, "Exported to ", el("code", {}, run.detail.export)));
  return found.length ? el("div", { class: "row links" }, found) : null;
}

/* Whose curves are shown where this run took over what another one had trained. */
function reusedCurves(makers) {
  return [...new Set(Object.values(makers))].map((id) =>
    el(
      "p",
      { class: "meta" },
      `Curves of ${Object.keys(makers)
        .filter((phase) => makers[phase] === id)
        .map(words)
        .join(" and ")}: those of ${id}, whose result was reused.`,
    ),
  );
}

function summary(run, index) {
  const tags = (run.tags || []).map((tag) => {
    const button = el("button", { type: "button", class: "tag", title: `Runs tagged ${tag}` }, tag);
    button.addEventListener("click", () => filterTag(tag));
    return button;
  });
  const facts = [
    run.kind,
    run.models,
    run.name ? run.run_id : null,
    when(run.created_at),
    `elapsed ${duration(run.elapsed_s)}`,
  ];
  return el(
    "section",
    { class: "card", "data-run": run.run_id },
    el(
      "div",
      { class: "row" },
      el("span", { class: "title" }, index === null ? null : dot(index), called(run)),
      stateChip(run),
      tags,
    ),
    verdict(run),
    el("div", { class: "meta" }, facts.filter(Boolean).join(" · ")),
    run.notes ? el("p", { class: "meta" }, run.notes) : null,
    reusedCurves(run.detail?.curves_of || {}),
    run.alerts.map((alert) => el("div", { class: "alert" }, `${alert.code}: ${alert.message}`)),
    run.error ? el("div", { class: "alert" }, run.error) : null,
    links(run),
  );
}

/* A bar from 0 (or from the middle) to a value, with its interval across it; places in percent. */
function bar(value, place, kind, index) {
  const [middle, low, high] = Array.isArray(value) ? value : [value];
  const zero = place(0),
    left = Math.min(place(middle), zero),
    width = Math.abs(place(middle) - zero);
  const filled = kind ? "" : `;background:${color(index)}`;
  const style = `left:${left.toFixed(2)}%;width:${Math.max(width, 0.4).toFixed(2)}%${filled}`;
  const fill = el("i", { class: kind, style });
  const across =
    low === undefined
      ? null
      : el("s", { style: `left:${place(low).toFixed(2)}%;width:${(place(high) - place(low)).toFixed(2)}%` });
  return el("div", { class: "bar", "aria-hidden": "true" }, fill, across);
}

function barRow(name, told, drawn) {
  return el("div", {}, el("div", { class: "head" }, el("span", {}, name), told), drawn);
}

const clipped = (percent) => Math.min(Math.max(percent, 0), 100);

function accuracyBars(run) {
  const rows = Object.entries(run.scores).filter(([, scores]) => "greedy_accuracy" in scores);
  if (!rows.length) return null;
  return [
    el("h3", {}, "Greedy accuracy, with 95 % intervals"),
    el(
      "div",
      { class: "bars" },
      rows.map(([model, { greedy_accuracy: value }], index) =>
        barRow(
          model === run.teacher_row && model !== "teacher" ? `${model} (teacher)` : model,
          figure(value),
          bar(value, (at) => clipped(at * 100), null, index ? 7 : 0),
        ),
      ),
    ),
  ];
}

function differenceBars(run) {
  if (!run.comparisons.length) return null;
  const reach = Math.max(...run.comparisons.flatMap((pair) => pair.accuracy_difference.map(Math.abs))) || 1;
  const place = (at) => clipped(50 + (at / reach) * 50);
  return [
    el("h3", {}, "Accuracy minus the others', paired by prompt, with 95 % intervals"),
    el(
      "div",
      { class: "bars" },
      run.comparisons.map((pair) => {
        const [, low, high] = pair.accuracy_difference,
          teacher = pair.baseline === run.teacher_row;
        const kind = teacher ? "" : low > 0 ? "gain" : high < 0 ? "loss" : "";
        const drawn = bar(pair.accuracy_difference, place, kind || "none", 0);
        drawn.append(el("u"));
        return barRow(
          `${pair.candidate} minus ${pair.baseline}${teacher && pair.baseline !== "teacher" ? " (teacher)" : ""}`,
          figure(pair.accuracy_difference, kind),
          drawn,
        );
      }),
    ),
  ];
}

const MEASURES = {
  greedy_accuracy: "accuracy (95 %)",
  sampled_accuracy: "sampled accuracy",
  reverse_kl: "reverse KL, nats per token",
  mean_response_tokens: "tokens",
};

function scoreTable(run) {
  const models = Object.entries(run.scores),
    names = Object.keys(MEASURES).filter((name) => models.some(([, scores]) => name in scores));
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          el("th", {}, "model"),
          names.map((name) => el("th", {}, MEASURES[name])),
        ),
      ),
      el(
        "tbody",
        {},
        models.map(([model, scores]) =>
          el(
            "tr",
            {},
            el("td", { class: "long" }, model),
            names.map((name) => el("td", { class: "figure" }, name in scores ? figure(scores[name]) : "–")),
          ),
        ),
      ),
    ),
  );
}

function gain(run) {
  if (!Object.keys(run.scores).length) return null;
  return card(
    "Gain",
    differenceBars(run),
    accuracyBars(run),
    el("details", { "data-key": `scores ${run.run_id}` }, el("summary", {}, "All figures"), scoreTable(run)),
  );
}

/* A line of the log with the time of day alone, and without the name of the module that wrote it. */
const logLine = (line) =>
  line.replace(/^\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)[.\d]*Z (?:INFO )?(?:([A-Z]+) )?[\w.]+: /, "$1 $2 ");

function phases(run) {
  const spent = new Map(run.costs.map((cost) => [cost.stage, cost])),
    planned = run.detail?.planned_seconds || {};
  // Times are those of a stage in all its rounds: where there are several, they stand with the costs alone.
  const once = new Set(run.phases.map((phase) => phase.name.split(" ")[0])).size === run.phases.length;
  const rows = run.phases.map((phase) => {
    const cost = once ? spent.get(phase.name) : undefined,
      plan = once ? planned[phase.name] : undefined;
    const told = cost
      ? cost.reused
        ? "reused"
        : duration(cost.seconds)
      : plan !== undefined && phase.state !== "done"
        ? `about ${duration(plan)}`
        : "";
    return el(
      "li",
      { class: phase.state },
      el("b", {}, words(phase.name)),
      el("div", { class: "meta" }, [phase.state, told].filter(Boolean).join(" · ")),
    );
  });
  const log = run.detail?.log?.length
    ? el(
        "pre",
        { class: "log", tabindex: "0", "aria-label": "The log's last lines" },
        run.detail.log.map(logLine).join("\n"),
      )
    : null;
  const few = rows.length <= 7 ? "phases few" : "phases";
  return card("Phases", el("ol", { class: few, style: `--count:${rows.length}` }, rows), progress(run), log);
}

function progress(run) {
  if (!ACTIVE.has(run.state)) return null;
  const now = run.progress,
    share = now && now.total ? now.done / now.total : 0;
  const told = [
    now ? `${now.done} of ${now.total} ${now.unit}` : null,
    typeof run.eta_s === "number" ? `about ${duration(run.eta_s)} left` : null,
  ];
  return el(
    "div",
    { class: "progress" },
    el("div", { class: "meta" }, told.filter(Boolean).join(" · ") || "waiting"),
    el(
      "div",
      {
        class: "bar thin",
        role: "progressbar",
        "aria-valuemin": 0,
        "aria-valuemax": 100,
        "aria-valuenow": Math.round(share * 100),
        "aria-label": "Progress of the phase",
      },
      el("i", { style: `left:0;width:${(share * 100).toFixed(1)}%` }),
    ),
  );
}

function costs(run) {
  if (!run.costs.length) return null;
  const planned = run.detail?.planned_seconds || {};
  const longest = Math.max(...run.costs.flatMap((cost) => [cost.seconds, planned[cost.stage] || 0])) || 1;
  return card(
    "Time by stage, against the plan",
    el(
      "div",
      { class: "bars" },
      run.costs.map((cost) => {
        const plan = planned[cost.stage],
          width = (seconds) => clipped((100 * seconds) / longest).toFixed(2);
        const told = [
          cost.reused ? `reused, took ${duration(cost.seconds)}` : duration(cost.seconds),
          plan === undefined ? null : `planned ${duration(plan)}`,
          cost.tokens ? `${number(cost.tokens)} tokens` : null,
        ];
        return barRow(words(cost.stage), el("span", {}, told.filter(Boolean).join(" · ")), [
          el(
            "div",
            { class: "bar thin" },
            el("i", { class: cost.reused ? "reused" : null, style: `left:0;width:${width(cost.seconds)}%` }),
          ),
          plan === undefined
            ? null
            : el("div", { class: "bar thin" }, el("i", { class: "reused", style: `left:0;width:${width(plan)}%` })),
        ]);
      }),
    ),
    run.costs.some((cost) => planned[cost.stage] !== undefined)
      ? el("p", { class: "note" }, "The grey bar below is the plan's estimate.")
      : null,
  );
}

function settingRows(entries) {
  return el(
    "table",
    { class: "settings" },
    el(
      "tbody",
      {},
      entries.map(([key, value]) =>
        el("tr", {}, el("td", {}, el("code", {}, key)), el("td", { class: "long" }, shown(value))),
      ),
    ),
  );
}

function settings(run) {
  const found = run.detail;
  if (!found) return null;
  const all = Object.entries(found.settings),
    changed = all.filter(([key]) => found.changed.some((name) => key === name || key.startsWith(`${name}.`)));
  return card(
    "Settings",
    el("h3", {}, changed.length ? `Different from the preset ${found.preset}` : `As in the preset ${found.preset}`),
    changed.length ? settingRows(changed) : null,
    el("h3", { style: "margin-top:12px" }, "Inputs"),
    settingRows(Object.entries(found.inputs)),
    el(
      "details",
      { "data-key": `settings ${run.run_id}` },
      el("summary", {}, `All ${all.length} settings`),
      settingRows(all),
    ),
  );
}
