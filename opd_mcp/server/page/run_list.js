/* The runs at the left: filters, pages, and which of them are shown. */
const STATES = ["running", "queued", "succeeded", "failed", "cancelled", "lost"];
const KINDS = ["distill", "sft", "cache", "generate", "benchmark", "sample", "export", "assess"];
const view = { run_ids: [], state: "", kind: "", name: "", tag: "", cursor: "" };
const earlier = [];

function sparkline(points) {
  if (!points?.length) return null;
  const low = Math.min(...points),
    high = Math.max(...points),
    span = high - low || 1;
  const at = (value, i) =>
    `${((i / (points.length - 1)) * 70 + 1).toFixed(1)},${(24 - ((value - low) / span) * 22).toFixed(1)}`;
  const root = svg("svg", { viewBox: "0 0 72 26", "aria-hidden": "true", preserveAspectRatio: "none" });
  root.append(svg("polyline", { points: points.map(at).join(" ") }));
  return root;
}

function listed(row, points, chosen) {
  const line = sparkline(points),
    [word, kind] = outcome(row, row.state === "succeeded" && row.note);
  const box = el("input", { type: "checkbox", "aria-label": `Compare ${called(row)}` });
  box.checked = chosen.includes(row.run_id);
  box.addEventListener("change", () =>
    choose(
      box.checked ? [...view.run_ids, row.run_id].slice(-MAX_RUNS) : view.run_ids.filter((id) => id !== row.run_id),
    ),
  );
  const button = el(
    "button",
    { type: "button", "data-run": row.run_id, "aria-current": String(chosen.includes(row.run_id)) },
    el("span", { class: line ? "name short" : "name" }, called(row)),
    el(
      "span",
      { class: "under" },
      el("span", { class: `word ${kind}` }, word),
      ` · ${row.kind} · ${when(row.created_at).replace(",", "")}`,
    ),
    line,
  );
  button.addEventListener("click", () => choose([row.run_id]));
  return el("li", {}, box, button);
}

function showList(feed, chosen) {
  const rows = feed.listed || [],
    focused = document.activeElement?.dataset?.run;
  show("list", [rows, feed.sparks, chosen], () => rows.map((row) => listed(row, feed.sparks?.[row.run_id], chosen)));
  const buttons = [...byId("list").querySelectorAll("button")];
  const stop =
    buttons.find((each) => each.dataset.run === focused)
    || buttons.find((each) => chosen.includes(each.dataset.run))
    || buttons[0];
  for (const each of buttons) each.tabIndex = each === stop ? 0 : -1;
  if (focused && document.activeElement === document.body) stop?.focus();
  const newer = el("button", { type: "button" }, "Newer"),
    older = el("button", { type: "button" }, "Older");
  newer.disabled = !earlier.length;
  older.disabled = !feed.next_cursor;
  newer.addEventListener("click", () => {
    view.cursor = earlier.pop();
    refresh();
  });
  older.addEventListener("click", () => {
    earlier.push(view.cursor);
    view.cursor = feed.next_cursor;
    refresh();
  });
  const first = earlier.length * 20 + 1,
    total = Math.max(feed.total || 0, rows.length);
  show("paging", [feed.next_cursor, earlier.length, rows.length, total], () => [
    newer,
    older,
    el("span", { class: "note" }, rows.length ? `${first} to ${first + rows.length - 1} of ${total}` : "no run fits"),
  ]);
  byId("toggle").textContent = total ? `All runs (${total})` : "All runs";
}

/* Up and down move between the runs, without opening them. */
byId("list").addEventListener("keydown", (event) => {
  const buttons = [...byId("list").querySelectorAll("button")],
    at = buttons.indexOf(document.activeElement);
  const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 };
  if (at < 0 || !(event.key in moves)) return;
  event.preventDefault();
  const next = buttons[Math.min(Math.max(moves[event.key], 0), buttons.length - 1)];
  for (const each of buttons) each.tabIndex = each === next ? 0 : -1;
  next.focus();
});

byId("toggle").addEventListener("click", () => {
  const open = byId("side").classList.toggle("open");
  byId("toggle").setAttribute("aria-expanded", String(open));
  tellSize();
});

function setUpFilters() {
  const form = byId("filters");
  for (const [name, values] of [
    ["state", STATES],
    ["kind", KINDS],
  ])
    form.elements[name].replaceChildren(...["", ...values].map((value) => el("option", { value }, value || "all")));
  let pause = 0;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => {
      for (const name of ["name", "tag", "state", "kind"]) view[name] = form.elements[name].value.trim();
      view.cursor = "";
      earlier.length = 0;
      refresh();
    }, 250);
  });
}

function filterTag(tag) {
  byId("filters").elements.tag.value = tag;
  byId("filters").dispatchEvent(new Event("input"));
  byId("side").classList.add("open");
  byId("toggle").setAttribute("aria-expanded", "true");
}
