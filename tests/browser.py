"""Chromium without a window, spoken to through two pipes (DevTools' protocol): no package, no port, no network."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
)
PATIENCE = 30.0
"""Seconds for a browser that runs to answer."""
START = 120.0
"""Seconds for its first answer: a program just installed, read from a disk that tests keep busy. Tried twice."""


def found() -> str:
    """A browser's program: $CHROMIUM, or one by its usual names; empty where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), "")


def start(program: str, folder: Path) -> Browser:
    """A browser that answers, its files in a folder. Raises TimeoutError, with what it printed, where two do not."""
    try:
        return Browser(program, folder / "first")
    except TimeoutError:
        return Browser(program, folder / "second")


class Browser:
    """One page of one browser."""

    def __init__(self, program: str, folder: Path, width: int = 1280, height: int = 900) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (theirs_in, theirs_out)]

        def hand_over() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        words = [program, *FLAGS, f"--window-size={width},{height}", f"--user-data-dir={folder}", "about:blank"]
        folder.mkdir(parents=True)
        with (folder / "printed").open("w") as log:
            said = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(words, close_fds=False, preexec_fn=hand_over, **said)
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._in, self._out, self._rest, self._number = ours_in, ours_out, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self._patience = START
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
        except (TimeoutError, RuntimeError, OSError) as error:
            self.process.kill()
            self.close()
            printed = (folder / "printed").read_text(errors="replace")[-2000:]
            raise TimeoutError(f"no browser: {error}; it printed: {printed or 'nothing'}") from error
        self._patience = PATIENCE
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command's result. Raises RuntimeError where it fails, TimeoutError where it does not come."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + self._patience
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            if not (data := os.read(self._in, 1 << 20)):
                raise RuntimeError("the browser has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        self._listen(message.get("method", ""), message.get("params", {}))
        return message

    def _listen(self, event: str, said: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(arg.get("value")) for arg in said["args"]))
        elif event == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent" and said["request"]["url"].startswith(("http:", "https:", "ws")):
            self.complaints.append(f"asks the network for {said['request']['url']}")

    def open(self, address: str) -> None:
        """Load a page and wait for it."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "failed"))
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 15.0) -> Any:
        """Wait for an expression to become true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {script}")
            time.sleep(0.05)
        return value

    def key(self, name: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": name} if len(name) == 1 and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, **text)

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        options: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 6000), "scale": 1}
            options = {"captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))
        return path

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
