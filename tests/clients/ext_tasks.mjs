// @modelcontextprotocol/ext-tasks as the requester of a run: a task to its result, and one that is cancelled.
// Usage: node ext_tasks.mjs URL TEACHER; prints one JSON line.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
const require = createRequire(process.env.CLIENTS + "/package.json");
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { Client, StreamableHTTPClientTransport } = await load("@modelcontextprotocol/client");
const { createTaskSessionFromClient } = await import(
  pathToFileURL(process.env.CLIENTS + "/node_modules/@modelcontextprotocol/ext-tasks/dist/client/index.js").href);

const [url, teacher] = process.argv.slice(2);
const clientInfo = { name: "ext-tasks", version: "1" };
const client = new Client(clientInfo, { versionNegotiation: { mode: "auto" } });
await client.connect(new StreamableHTTPClientTransport(new URL(url)));
let id = 0;
// The SDK's client has no way to send requests of an extension as they are, so the host does: one POST a request.
async function rawDispatch(request) {
  const name = request.params?.taskId ?? request.params?.name;
  const answer = await fetch(url, {
    method: "POST",
    headers: {
      "Content-Type": "application/json", Accept: "application/json, text/event-stream",
      "MCP-Protocol-Version": "2026-07-28", "Mcp-Method": request.method, "Mcp-Name": name,
    },
    body: JSON.stringify({ jsonrpc: "2.0", id: ++id, ...request }),
  });
  const text = await answer.text();
  const body = JSON.parse(text.startsWith("{") ? text : text.split("\n").find((line) => line.startsWith("data: ")).slice(6));
  return body.error ? { kind: "error", error: body.error } : { kind: "result", result: body.result };
}
const session = createTaskSessionFromClient(client, {
  endpointId: "test", rawDispatch,
  v2RequestFraming: { protocolVersion: "2026-07-28", clientInfo, clientCapabilities: {} },
});
const start = (prompt, tokens) => session.callTool("sample_model",
  { model: teacher, prompts: [prompt], max_new_tokens: tokens });
const first = await start("1+1=?", 8);
const { outcome } = await first.settle();
const second = await start("2+2=?", 16);
await second.cancel();
const cancelled = await second.settle().then((settled) => settled.outcome, (error) => ({ kind: String(error.name) }));
console.log(JSON.stringify({ execution: first.kind ?? null, outcome, cancelled }));
await session.close();
await client.close();
