"""The dashboard in headless Chromium: in an app's frame with a scripted host, and from the server with its token."""

import json
import queue
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from opd_mcp.server.page.assembly import dashboard_html
from tests.clients.browser import chromium

RUN = {
    "run_id": "lightning-qwen-1", "kind": "distill", "state": "running", "created_at": "2026-08-01T10:00:00Z",
    "models": "student ← teacher <b>bold</b>",
    "phases": [{"name": "sft", "state": "done"}, {"name": "distill", "state": "running"}],
    "progress": {"done": 30, "total": 100, "unit": "steps"}, "eta_s": 42,
    "curves": [{"key": "distill.loss", "steps": [1, 2, 3], "values": [3, 2, 1]}],
    "alerts": [{"time": "t", "code": "kl_rising", "message": "<img src=x onerror=document.title='hacked'>"}],
    "costs": [{"stage": "sft", "seconds": 12.5, "tokens": 1000}],
    "scores": {"distilled": {"greedy_accuracy": [0.81, 0.77, 0.85]}},
    "comparisons": [{"candidate": "distilled", "baseline": "sft", "accuracy_difference": [-0.4, -0.5, -0.3]}],
    "verdict": {"judgement": "worse", "sentence": "It lost <i>much</i>.", "cause": "The rate.", "next_action": {}},
}  # fmt: skip
HOST = """<!doctype html><meta charset="utf-8">
<iframe id="app" sandbox="allow-scripts" style="width:1000px;height:900px;border:0"></iframe>
<script>
const page = PAGE, feed = FEED, frame = document.getElementById("app");
let told = Promise.resolve(); // one request after the other, so that the order that is seen is the order they came in
window.addEventListener("message", ({ data, source }) => {
  if (source !== frame.contentWindow) return;
  const body = JSON.stringify({ method: data.method, params: data.params });
  told = told.then(() => fetch("/seen", { method: "POST", body }));
  const answer = (result) => source.postMessage({ jsonrpc: "2.0", id: data.id, result }, "*");
  if (data.method === "ui/initialize") answer({ protocolVersion: "2026-01-26", hostInfo: { name: "host", version: "1" },
    hostCapabilities: {}, hostContext: { theme: "THEME" } });
  if (data.method === "tools/call") answer({ content: [], structuredContent: feed });
});
frame.srcdoc = page.replace("</body>", PROBE + "</body>");
</script>"""
# The frame is sealed off from its host, as real ones are; it tells what it shows by a message of its own.
PROBE = """<script>setTimeout(() => parent.postMessage({ jsonrpc: "2.0", method: "test/shown", params: {
  text: document.body.innerText, title: document.title, theme: document.documentElement.dataset.theme,
  lines: document.querySelectorAll("canvas").length, bold: document.querySelectorAll("i:not(.bar > i), img").length,
  red: getComputedStyle(document.querySelector(".verdict b")).color } }, "*"), 3500)
<\\/script>"""


def final_markup(address: str) -> str:
    """What a page has become after five seconds of its own time."""
    command = chromium("--virtual-time-budget=5000", "--dump-dom", address)
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def messages_of(page: str, last: str) -> list[dict[str, Any]]:
    """What the app in a host page says to its host, up to a message of the method `last`."""
    seen: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode())

        def do_POST(self) -> None:
            seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        browser = subprocess.Popen(chromium("--remote-debugging-port=0", address), stderr=subprocess.DEVNULL)
        try:
            messages = [seen.get(timeout=60)]
            while messages[-1]["method"] != last:
                messages.append(seen.get(timeout=60))
        finally:
            browser.terminate()
            browser.wait(timeout=20)
            server.shutdown()
    return messages


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_an_apps_frame(node, theme):
    feed = {"runs": [RUN], "listed": [{"run_id": RUN["run_id"]}]}
    values = {"PAGE": dashboard_html(), "FEED": feed, "PROBE": PROBE.replace("<\\/", "</")}
    page = HOST.replace("THEME", theme)
    for name, value in values.items():
        page = re.sub(rf"\b{name}\b", lambda _, v=value: json.dumps(v).replace("</", "<\\/"), page)
    messages = messages_of(page, "test/shown")
    methods = [message["method"] for message in messages]
    assert methods[:2] == ["ui/initialize", "ui/notifications/initialized"]
    call = next(message for message in messages if message["method"] == "tools/call")
    assert call["params"]["name"] == "dashboard_feed"
    size = next(message for message in messages if message["method"] == "ui/notifications/size-changed")
    assert size["params"]["height"] > 300
    assert methods.count("tools/call") >= 2  # it keeps itself up to date
    shown = messages[-1]["params"]
    for part in (
        "lightning-qwen-1",
        "running",
        "30 of 100 steps",
        "about 42 s left",
        "kl_rising",
        "0.81",
        "0.77 to 0.85",
        "WORSE: It lost <i>much</i>.",
        "Cause: The rate.",
        "-0.4 -0.5 to -0.3 worse",
    ):
        assert part in shown["text"]
    assert "<b>bold</b>" in shown["text"]
    assert shown["red"] == {"light": "rgb(184, 47, 39)", "dark": "rgb(243, 134, 125)"}[theme]
    assert (shown["theme"], shown["lines"], shown["bold"], shown["title"]) == (theme, 1, 0, "opd-mcp runs")


def test_from_the_server_with_its_token(node, serving):
    token = "a-token-for-this-test-only"
    serve = [sys.executable, "-m", "opd_mcp.cli", "serve", "--transport", "http", "--port", "PORT"]
    url = serving(*serve, OPD_TOKEN=token)
    assert "401" in final_markup(f"{url}/dashboard")
    page = final_markup(f"{url}/dashboard?token={token}")
    assert re.search(r'id="note"[^>]*>(updated|No run yet)', page), page[-500:]
