"""A headless Chromium, driven over its DevTools protocol by a pair of pipes: no driver, no port, no package.

Messages are JSON texts that end in a zero byte; Chromium reads them from its file 3 and writes to its file 4.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--remote-debugging-pipe", "--hide-scrollbars", "--force-color-profile=srgb"),
]


def find_chromium():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: install the distribution's (Debian: `apt-get install chromium`)"
)


class Browser:
    """One browser with one page; `with Browser(folder) as page`. Calls block: use asyncio.to_thread beside a server."""

    def __init__(self, folder: Path, timeout_s: float = 40.0):
        self.folder, self.timeout_s = folder, timeout_s
        self._number, self._events, self._rest = 0, [], b""

    def __enter__(self):
        from_us, self._write = os.pipe()
        self._read, to_us = os.pipe()

        def wire():
            a, b = os.dup(from_us), os.dup(to_us)
            os.dup2(a, 3), os.dup2(b, 4)

        command = [find_chromium(), *FLAGS, f"--user-data-dir={self.folder / 'profile'}", "about:blank"]
        with (self.folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(command, close_fds=False, preexec_fn=wire, stdout=log, stderr=log)
        os.close(from_us), os.close(to_us)
        pages = self._call("Target.getTargets", session=None)["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        attach = {"targetId": target, "flatten": True}
        self._session = self._call("Target.attachToTarget", attach, session=None)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.close(self._write)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def forget(self):
        """What the pages before this one asked and complained of."""
        self.value("0")
        self._events.clear()

    def open(self, url, dark=False, width=1280, height=900):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", size)
        self._call("Page.navigate", {"url": url})

    def value(self, expression):
        """The value of a JavaScript expression, as JSON carries it. Raises where it throws."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self._call("Runtime.evaluate", asked)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, element):
        """The text of the element with this id, as it is shown; None where there is none or it is hidden."""
        found = f"document.getElementById({json.dumps(element)})"
        return self.value(f"{found}?.checkVisibility() ? {found}.innerText : null")

    def until(self, expression, within_s=20.0):
        """Wait for a JavaScript expression to be true."""
        end_s = time.monotonic() + within_s
        while not self.value(expression):
            assert time.monotonic() < end_s, (
                f"never true: {expression}; the page says {self.value('document.body.innerText')[-2000:]!r}"
            )
            time.sleep(0.05)

    def press(self, *keys):
        """Keys of the keyboard, by name, into what has the focus; a text is typed."""
        for key in keys:
            if key in CODES:
                text = {"text": "\r"} if key == "Enter" else {}
                for kind in ("keyDown", "keyUp"):
                    self._call(
                        "Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key, **text, **CODES.get(key, {})}
                    )
            else:
                self._call("Input.insertText", {"text": key})

    def point(self, x, y):
        self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def click(self, expression):
        """The left button of the mouse, on the middle of the element that a JavaScript expression gives."""
        box = f"(({expression}).scrollIntoView({{block: 'nearest'}}), ({expression}).getBoundingClientRect())"
        x, y = self.value(f"(() => {{ const b = {box}; return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            asked = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self._call("Input.dispatchMouseEvent", asked)

    def screenshot(self, file):
        size = self.value("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        answer = self._call("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        Path(file).write_bytes(base64.b64decode(answer["data"]))

    def complaints(self):
        """What the page logged as wrong: exceptions, refused scripts and styles, failed loads."""
        self.value("0")
        thrown = [e["params"]["exceptionDetails"] for e in self._events if e["method"] == "Runtime.exceptionThrown"]
        logged = [e["params"]["entry"] for e in self._events if e["method"] == "Log.entryAdded"]
        return thrown + [entry for entry in logged if entry["level"] == "error"]

    def requested(self):
        """URLs that the page has asked for."""
        return [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]

    def _call(self, method, params=None, session=""):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params or {}}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self):
        while b"\0" not in self._rest:
            data = os.read(self._read, 1 << 20)
            assert data, f"chromium ended: {(self.folder / 'chromium.log').read_text()[-2000:]}"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)


CODES = {
    "Enter": {"windowsVirtualKeyCode": 13},
    "Tab": {"windowsVirtualKeyCode": 9},
    "Escape": {"windowsVirtualKeyCode": 27},
    "End": {"windowsVirtualKeyCode": 35},
    "Home": {"windowsVirtualKeyCode": 36},
    "ArrowLeft": {"windowsVirtualKeyCode": 37},
    "ArrowUp": {"windowsVirtualKeyCode": 38},
    "ArrowRight": {"windowsVirtualKeyCode": 39},
    "ArrowDown": {"windowsVirtualKeyCode": 40},
}
