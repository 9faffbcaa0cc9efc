/* Two ways to the same feed: the host of the frame, or the server this page came from. */
const framed = window.parent !== window,
  waiting = new Map();
let nextId = 1;

function post(message) {
  window.parent.postMessage({ jsonrpc: "2.0", ...message }, "*");
}

function request(method, params) {
  return new Promise((resolve, reject) => {
    const id = nextId++;
    waiting.set(id, { resolve, reject });
    post({ id, method, params });
  });
}

function tellSize() {
  if (framed)
    post({
      method: "ui/notifications/size-changed",
      params: { width: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight },
    });
}

async function feed(view) {
  const given = Object.fromEntries(Object.entries(view).filter(([, value]) => value && value.length));
  if (framed) {
    const result = await request("tools/call", { name: "dashboard_feed", arguments: given });
    if (result.isError) throw new Error(result.content?.[0]?.text || "The feed failed.");
    return result.structuredContent;
  }
  const query = new URLSearchParams({ ...given, run_ids: (given.run_ids || []).join(",") });
  const answer = await fetch(`dashboard/feed?${query}`, { cache: "no-store" });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error || `HTTP ${answer.status}`);
  return body;
}

/* Where a run's document opens: from the server by its address, in a frame by the name of its resource. */
function documentLink(run, found) {
  const name = { report: "Report", card: "Model card" }[found.kind] || found.kind;
  if (framed) return el("span", {}, `${name}: `, el("code", {}, found.resource || found.path));
  const query = new URLSearchParams({ run_id: run.run_id, kind: found.kind });
  return el("a", { href: `dashboard/document?${query}`, target: "_blank", rel: "noopener", title: found.path }, name);
}

function theme(name) {
  document.documentElement.dataset.theme = name === "dark" ? "dark" : "light";
  repaintCharts();
}

window.addEventListener("message", (event) => {
  if (!framed || event.source !== window.parent || event.data?.jsonrpc !== "2.0") return;
  const { id, method, params, result, error } = event.data;
  if (method === undefined && waiting.has(id)) {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error) reject(new Error(error.message));
    else resolve(result);
  } else if (method === "ui/notifications/tool-result" && params?.structuredContent?.runs) {
    draw(params.structuredContent);
  } else if (method === "ui/notifications/host-context-changed" && params?.theme) {
    theme(params.theme);
  } else if (method === "ui/resource-teardown" || method === "ping") {
    if (method !== "ping") stop();
    post({ id, result: {} });
  }
});
