"""A headless Chromium that tests drive through its debugging pipe: real keys and clicks, and no package for it."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27, "Enter": 13, "Backspace": 8}


class Browser:
    """One page of a browser.

    Attributes:
        complaints: what the page's console said and which errors nobody caught.
        requests: addresses that the page asked for, its own among them. What the browser asks for itself is not there.
    """

    def __init__(self, commands: int, answers: int) -> None:
        """`commands` and `answers` are file descriptors of the browser's pipe. It must have one page."""
        self._commands, self._answers = commands, answers
        self._received, self._count, self._session = b"", 0, None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        (page,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command of the DevTools protocol. Fails where it refuses, or after 60 s."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def open(self, page: Path | str, width: int, height: int) -> None:
        """Shows a file or an address in a window of this size in pixels, and forgets the notes of the page before."""
        self._go_to("about:blank")
        self.complaints.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=width < 600)
        self._go_to(page if isinstance(page, str) else page.as_uri())

    def _go_to(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        wait_for(lambda: self.run("document.readyState + ' ' + location.href.split('#')[0]") == f"complete {address}")

    def run(self, script: str) -> Any:
        """The value of a line of JavaScript on the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as from a keyboard."""
        for kind in ("keyDown", "keyUp"):
            code = KEYS[key] if key in KEYS else ord(key.upper())
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Letters, into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, element_id: str) -> None:
        """A click of the mouse into the middle of an element."""
        place = self._middle(f"#{element_id}")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def tap(self, selector: str) -> None:
        """A finger on the middle of an element."""
        place = self._middle(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _middle(self, selector: str) -> dict[str, float]:
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.run(f"{element}.getBoundingClientRect().toJSON()")
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

    def screenshot(self, path: Path) -> None:
        """Saves a PNG of the whole page."""
        done = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(done["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            assert select.select([self._answers], [], [], 60)[0], "the browser does not answer"
            chunk = os.read(self._answers, 2**20)
            assert chunk, "the browser has gone"
            self._received += chunk
        message, self._received = self._received.split(b"\0", 1)
        answer = json.loads(message)
        match answer.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.complaints.append(json.dumps(answer["params"]))
            case "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        return answer


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser that keeps its files in the folder `profile` and reaches no other machine, killed at the end."""
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()

    def as_3_and_4() -> None:
        """Where the browser looks for them. By way of high numbers, as one of them may be in the other's place."""
        high = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (read_commands, write_answers)]
        for number, one in enumerate(high, start=3):
            os.dup2(one, number)

    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
        "about:blank",
    ]
    process = subprocess.Popen(
        command, preexec_fn=as_3_and_4, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for one in (read_commands, write_answers):
        os.close(one)
    try:
        yield Browser(commands, answers)
    finally:
        process.kill()
        process.wait()
        for one in (commands, answers):
            os.close(one)
