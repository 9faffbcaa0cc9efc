// @modelcontextprotocol/sdk 1.x, the client most hosts are built on. Usage as current_client.mjs, without the era.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
const require = createRequire(process.env.CLIENTS + "/package.json");
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { Client } = await load("@modelcontextprotocol/sdk/client/index.js");
const { StreamableHTTPClientTransport } = await load("@modelcontextprotocol/sdk/client/streamableHttp.js");
const { StdioClientTransport } = await load("@modelcontextprotocol/sdk/client/stdio.js");

const [target, ...args] = process.argv.slice(2);
const client = new Client({ name: "test", version: "1" });
const transport = target.startsWith("http")
  ? new StreamableHTTPClientTransport(new URL(target))
  : new StdioClientTransport({ command: target, args, env: process.env });
await client.connect(transport);
const tools = (await client.listTools()).tools.map((tool) => tool.name);
const setup = await client.callTool({ name: "inspect_setup", arguments: {} });
const refused = await client.callTool({ name: "get_run_status", arguments: { run: "x" } });
const templates = (await client.listResourceTemplates()).resourceTemplates.length;
const page = await client.readResource({ uri: "ui://opd-mcp/dashboard.html" });
console.log(JSON.stringify({
  era: "legacy", tools, version: setup.structuredContent.version, error: refused.content[0].text,
  isError: refused.isError, templates, page: page.contents[0].mimeType,
}));
await client.close();
