"""A headless Chromium driven over its debugging pipe: what a page asked the network for, what it complained about, how
it looks. No port is opened and nothing is downloaded."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_LAUNCHER = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 10) for fd in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)  # Chromium reads from descriptor 3 and writes to 4
os.execv(sys.argv[3], sys.argv[3:])
"""
_TIMEOUT_S = 60.0
Event = dict[str, Any]


@dataclass
class Page:
    """One page as it was loaded. `requests`: URLs asked for besides the page itself and data URIs; `complaints`: errors
    and warnings of scripts, console and browser."""

    browser: Browser
    session: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        found = self.browser.call("Runtime.evaluate", self.session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path, whole: bool = False, clip: dict[str, float] | None = None) -> Path:
        """A PNG of the window, of the whole page, or of a part of it."""
        if clip is not None or whole:
            size = self.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
            clip = clip or {"x": 0, "y": 0, "width": size[0], "height": size[1]}
        area = {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True} if clip else {}
        found = self.browser.call("Page.captureScreenshot", self.session, format="png", **area)
        path.write_bytes(base64.b64decode(found["data"]))
        return path


class Browser:
    """A running Chromium."""

    def __init__(self, executable: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [executable, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        launcher = [sys.executable, "-c", _LAUNCHER, str(theirs_in), str(theirs_out), *command]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(launcher, pass_fds=(theirs_in, theirs_out), stdout=quiet, stderr=quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest = 0, b""
        self.events: list[Event] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are kept."""
        self._number += 1
        message: Event = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            found = self._next(deadline)
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return dict(found["result"])
            self.events.append(found)

    def wait_for(self, method: str, session: str) -> None:
        """Return once the event has come."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not any(e.get("method") == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self._next(deadline))

    def _next(self, deadline: float) -> Event:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError(f"Chromium did not answer within {_TIMEOUT_S:.0f} s")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise EOFError("Chromium has gone away")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False, media: str = "") -> Page:
        """Load a file in a fresh tab of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.call(f"{domain}.enable", session)
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **screen)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", session, media=media, features=scheme)
        self.events.clear()
        page = Page(self, session)
        self.call("Page.navigate", session, url=path.absolute().as_uri())
        self.wait_for("Page.loadEventFired", session)
        page.evaluate("document.readyState")  # events up to here have come in
        page.requests, page.complaints = _requests(self.events, path.absolute().as_uri()), _complaints(self.events)
        return page

    def close(self) -> None:
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            self.call("Browser.close")
        os.close(self._out)
        os.close(self._in)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _requests(events: list[Event], own: str) -> list[str]:
    asked = [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
    return [url for url in asked if url != own and not url.startswith("data:")]


def _complaints(events: list[Event]) -> list[str]:
    found = []
    for event in events:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            found.append(json.dumps(parameters["exceptionDetails"]))
        if event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            found.append(json.dumps(parameters["args"]))
        if event.get("method") == "Log.entryAdded":
            found.append(json.dumps(parameters["entry"]))
    return found


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser for the time of a test; skips where there is none."""
    executable = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if executable is None:
        pytest.skip("no Chromium is installed: the page cannot be opened")
    browser = Browser(executable, profile)
    try:
        yield browser
    finally:
        browser.close()
