"""Chromium over its debugging pipe: pages at a given width and theme, keys, what a page shows, and pictures of it.

`python tests/clients/browser.py ADDRESS FILE.png [WIDTH] [light|dark]` takes one picture. Protocol:
https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
KEYS |= {"Tab": 9, "Escape": 27, "Enter": 13}
DEADLINE_SECONDS = 60.0


def chromium(*options: str) -> list[str]:
    """The browser's command line."""
    binary = shutil.which("chromium")
    assert binary, "make test-clients installs chromium"
    return [binary, "--headless", "--no-sandbox", "--disable-gpu", *options]


class Browser:
    """One Chromium with one page; a context manager."""

    def __init__(self) -> None:
        commands, self._out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        self._in, answers = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())

        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ("--remote-debugging-pipe", "--hide-scrollbars", f"--user-data-dir={self._profile.name}")
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", *chromium(*options)],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._rest = b""
        self._next = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events are passed over."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._next:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._in, 1 << 20)
            assert block, "the browser ended"
            self._rest += block
        first, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(first)
        return found

    def open(self, address: str, *, width: int, height: int = 900, theme: str = "light", until: str = "true") -> None:
        """Load a page at this size and theme, and wait until the expression `until` is true in it."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Page.navigate", url=address)
        self.wait(f"location.href !== 'about:blank' && document.readyState === 'complete' && ({until})")

    def wait(self, expression: str) -> None:
        """Wait until the expression is true in the page."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self.value(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """The JSON value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        code = KEYS.get(key, ord(key.upper()[0]))
        text = {"Enter": "\r"}.get(key, "" if key in KEYS else key)
        for kind, typed in (("keyDown", {"text": text} if text else {}), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **typed)

    def picture(self, file: Path) -> None:
        """Write the whole page as a PNG, however long it is."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=size["width"],
            height=size["height"],
            deviceScaleFactor=1,
            mobile=False,
        )
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(found["data"]))


if __name__ == "__main__":
    address, file, width, theme = [*sys.argv[1:], *("1280", "light")[len(sys.argv) - 3 :]]
    with Browser() as browser:
        ready = "!document.getElementById('note') || document.getElementById('note').textContent !== 'Loading…'"
        browser.open(address, width=int(width), theme=theme, until=ready)
        time.sleep(0.5)  # charts follow their size in the next frames
        browser.picture(Path(file))
