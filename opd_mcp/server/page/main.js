/* Reads the feed again and again, and shows it: one run in full, or several next to each other. */
let timer = 0,
  last = null;
view.run_ids = (new URLSearchParams(location.search).get("run_ids") || "").split(",").filter(Boolean);

function draw(found) {
  last = found;
  view.run_ids = found.runs.map((run) => run.run_id);
  showList(found, view.run_ids);
  if (found.runs.length > 1 && found.comparison) drawSeveral(found);
  else drawOne(found.runs[0]);
  byId("note").textContent = found.runs.length ? `updated ${new Date().toLocaleTimeString("en-GB")}` : "No run yet.";
  tellSize();
  return [...found.runs, ...(found.listed || [])].some((run) => ACTIVE.has(run.state));
}

const PARTS = { summary: (run) => summary(run, null), gain, phases, samples, costs, settings };

function drawOne(run) {
  for (const [id, build] of Object.entries(PARTS)) show(id, run || null, () => (run ? build(run) : null));
  showCharts(
    run ? [run] : [],
    () => 0,
    () => "",
  );
}

function drawSeveral(found) {
  const indexOf = colorsOf(found);
  show("summary", [found.comparison, groupedBy], () => comparisonCard(found));
  for (const id of Object.keys(PARTS)) if (id !== "summary") show(id, null, () => null);
  showCharts(found.runs, indexOf, (run) => groupOf(run, found.comparison));
}

function redraw() {
  if (last) draw(last);
}

function choose(ids) {
  if (!ids.length) return;
  view.run_ids = ids;
  if (!framed) history.replaceState(null, "", `?${new URLSearchParams({ run_ids: ids.join(",") })}`);
  byId("side").classList.remove("open");
  byId("toggle").setAttribute("aria-expanded", "false");
  refresh();
}

function stop() {
  clearTimeout(timer);
}

let turn = 0;
async function refresh() {
  stop();
  const mine = ++turn;
  let active = false;
  try {
    const found = await feed(view);
    if (mine !== turn) return; // something else was asked for meanwhile
    active = draw(found);
  } catch (error) {
    if (mine !== turn) return;
    byId("note").textContent = `Not up to date: ${error.message}`;
    if (last?.runs.length && view.run_ids.length) view.run_ids = []; // a chosen run may have been deleted
  }
  timer = setTimeout(refresh, active ? 2000 : 10000);
}

const dark = window.matchMedia("(prefers-color-scheme: dark)");
theme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
document.body.classList.toggle("framed", framed);
setUpFilters();
chartTools();
(async () => {
  if (framed) {
    const host = await request("ui/initialize", {
      protocolVersion: "2026-01-26",
      appCapabilities: {},
      appInfo: { name: "opd-mcp dashboard", version: "2" },
    });
    if (host?.hostContext?.theme) theme(host.hostContext.theme);
    post({ method: "ui/notifications/initialized", params: {} });
  }
  await refresh();
})();
