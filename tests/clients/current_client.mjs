// @modelcontextprotocol/client 2.x against a URL, or against a command over stdio: list, call, a readable error,
// a resource. Usage: node current_client.mjs legacy|auto URL | COMMAND ARG…; prints one JSON line.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
const require = createRequire(process.env.CLIENTS + "/package.json");
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { Client, StreamableHTTPClientTransport } = await load("@modelcontextprotocol/client");
const { StdioClientTransport } = await load("@modelcontextprotocol/client/stdio");

const [era, target, ...args] = process.argv.slice(2);
const client = new Client({ name: "test", version: "1" }, era === "auto" ? { versionNegotiation: { mode: "auto" } } : {});
const transport = target.startsWith("http")
  ? new StreamableHTTPClientTransport(new URL(target), process.env.TOKEN
      ? { requestInit: { headers: { Authorization: `Bearer ${process.env.TOKEN}` } } } : undefined)
  : new StdioClientTransport({ command: target, args, env: process.env });
await client.connect(transport);
const tools = (await client.listTools()).tools.map((tool) => tool.name);
const setup = await client.callTool({ name: "inspect_setup", arguments: {} });
const refused = await client.callTool({ name: "get_run_status", arguments: { run: "x" } });
const templates = (await client.listResourceTemplates()).resourceTemplates.length;
const page = await client.readResource({ uri: "ui://opd-mcp/dashboard.html" });
console.log(JSON.stringify({
  era: client.getProtocolEra(), tools, version: setup.structuredContent.version, error: refused.content[0].text,
  isError: refused.isError, templates, page: page.contents[0].mimeType,
}));
await client.close();
