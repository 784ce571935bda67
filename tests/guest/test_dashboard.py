"""The dashboard in headless Chromium, on a real service with a real guest: what a person would do, key by key.

Screenshots stay in artefacts/dashboard. What the page says on the browser's console is an error, but for the one
request by which it learns that nobody has signed in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the service wants the extra `host`")
pytest.importorskip("playwright", reason="the browser's test wants playwright")

from playwright.sync_api import Browser as Chromium
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright

from ostler.api import dashboard
from ostler.planning.history import FILE, HOST, History, Sample

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = Path(__file__).parents[2] / "artefacts" / "dashboard"
TIMEOUT_MS = 100_000
OSTLER = (sys.executable, "-m", "ostler")
# A shell on the serial console, of a session of its own, so that the terminal is its.
SHELL = "sh -c 'exec setsid -cw sh </dev/ttyS0 >/dev/ttyS0 2>&1'"

pytestmark = [
    pytest.mark.usefixtures("needs_an_agent"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
    pytest.mark.skipif(not dashboard.is_built(), reason="the dashboard is not built: no npm"),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A service on a loopback port: its address, and a token of its administrator."""
    folder = tmp_path_factory.mktemp("host")
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    environment = {**os.environ, "OSTLER_RUNTIME": str(runtime), "OSTLER_DATA": str(folder / "data")}
    socket = str(folder / "host.sock")
    _remember_use(folder / "state")
    command = [*OSTLER, "host", "serve", "--state", str(folder / "state"), "--socket", socket,
               "--listen", "127.0.0.1:0", "--stop-guests"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as ran:
        try:
            yield _address(ran), _token(socket)
        finally:
            ran.send_signal(signal.SIGTERM)
            ran.wait(120)
            _remove_guests(environment)


def _remember_use(state: Path) -> None:
    """Ten minutes of an earlier service."""
    state.mkdir(mode=0o700)
    now = time.time()
    with History(state / FILE) as kept:
        kept.add(
            Sample(now - 60 * minute, HOST, 60.0, 0.5, 8 << 30, 1 << 30, 1e6, 1e6, 1e5, 1e5, vcpus=2, run_cpus=0.5)
            for minute in range(1, 11)
        )


def _remove_guests(environment: dict[str, str]) -> None:
    """Copies belong to nobody, and run on."""
    program = (
        "from ostler.client import guests; from ostler.control import pool, runtime\n"
        "for entry in runtime.entries(): guests.remove(entry, force=True)\n"
        "pool.stop()"
    )
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)


def _address(ran: subprocess.Popen[str]) -> str:
    assert ran.stdout is not None
    for line in ran.stdout:
        if found := re.search(r"http://[0-9.]+:\d+", line):
            return found[0]
    raise AssertionError("the service did not say where it listens")


def _token(socket: str) -> str:
    import httpx

    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://host") as client:
        made = client.post("/v1/tokens", json={"name": "browser", "role": "admin"})
    token: str = json.loads(made.raise_for_status().text)["token"]
    return token


class Browser:
    """Pages that note what goes wrong, and everybody they ask."""

    def __init__(self, chromium: Chromium, address: str) -> None:
        self._chromium, self.address = chromium, address
        self.troubles: list[str] = []
        self.hosts: set[str] = set()

    def page(self, **options: Any) -> Page:
        page = self._chromium.new_context(**options).new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("console", self._note)
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.goto(self.address)
        return page

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "401" not in message.text:
            self.troubles.append(message.text)


@pytest.fixture(scope="module")
def browser(service: tuple[str, str]) -> Iterator[Browser]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield Browser(chromium, service[0])
        finally:
            chromium.close()


def sign_in(page: Page, token: str) -> None:
    page.fill("input[name=token]", token)
    page.keyboard.press("Enter")
    page.wait_for_selector(".guests")
    page.wait_for_selector(".link.live")


def shoot(page: Page, name: str) -> None:
    page.screenshot(path=str(SHOTS / f"{name}.png"))


def type_at_once(page: Page, keys: str) -> None:
    """Faster than the browser tells of a new address."""
    page.evaluate("keys => [...keys].forEach(key => dispatchEvent(new KeyboardEvent('keydown', {key})))", keys)


def await_points(page: Page) -> None:
    """Until the first chart of the page has more than two samples."""
    expect(page.locator(".chart").first).to_have_attribute("data-points", re.compile(r"^([3-9]|\d\d+)$"))


def canvas(page: Page) -> str:
    """What the first chart looks like."""
    found: str = page.locator(".chart canvas").first.evaluate("canvas => canvas.toDataURL()")
    return found


def test_browser_wrong_token_is_refused_in_one_line(browser: Browser) -> None:
    page = browser.page(viewport={"width": 1360, "height": 860})

    page.fill("input[name=token]", "ostler_nonsense")
    page.keyboard.press("Enter")

    assert "token" in page.inner_text("[role=alert]")
    shoot(page, "sign-in")


def test_browser_charts_begin_with_what_was_kept(browser: Browser, service: tuple[str, str]) -> None:
    page = browser.page(viewport={"width": 1360, "height": 860})

    sign_in(page, service[1])

    expect(page.locator(".chart").first).to_have_attribute("data-points", re.compile(r"^\d\d+$"))
    shoot(page, "kept")


def test_browser_guest_defined_typed_into_saved_copied_moved_and_stopped(
    browser: Browser, service: tuple[str, str], tmp_path: Path
) -> None:
    page = browser.page(viewport={"width": 1360, "height": 860})
    sign_in(page, service[1])

    # Defined and started by the keyboard.
    page.keyboard.press("c")
    for field, value in (("name", "web"), ("memory", "256M"), ("command", SHELL)):
        page.fill(f"dialog input[name={field}]", value)
    shoot(page, "define")
    page.keyboard.press("Enter")
    page.wait_for_selector(".guest-head .state.good")
    page.wait_for_selector("[data-job=start][data-state=done]")

    # The chart moves.
    await_points(page)
    before, drawn = page.get_attribute(".chart >> nth=0", "data-points"), canvas(page)
    expect(page.locator(".chart").first).not_to_have_attribute("data-points", before or "")
    assert canvas(page) != drawn

    # The console is a terminal that answers.
    page.keyboard.press("2")
    page.wait_for_selector(".console-place[data-state=live]")
    # What is typed before somebody reads the port is lost.
    expect(page.locator(".xterm-rows")).to_contain_text("# ")
    page.keyboard.type("echo the answer is $((6*7))\n")
    expect(page.locator(".xterm-rows")).to_contain_text("the answer is 42")
    shoot(page, "console")
    page.keyboard.press("Control+]")

    # Saved, with the job's progress in the corner.
    page.keyboard.press("n")
    page.fill("dialog input[name=snapshot]", "web-ready")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-job=snapshot][data-state=done]")
    page.keyboard.press("t")
    page.wait_for_selector("tr[data-snapshot=web-ready]")
    shoot(page, "snapshots")
    _look_around(browser, page, service[1])
    _copy_and_move(page, tmp_path)

    # Stopped, and so the table says.
    page.keyboard.press("g")
    page.click("tr[data-guest=web] [data-action=stop]")
    page.wait_for_selector("tr[data-guest=web] .state.idle")
    shoot(page, "stopped")

    assert browser.troubles == []
    assert browser.hosts == {urlsplit(browser.address).netloc}


def _copy_and_move(page: Page, folder: Path) -> None:
    """A fork, another one from the snapshot, and the fork moved to where somebody listens for it."""
    page.goto(page.url.partition("#")[0] + "#/guest/web/charts")
    page.wait_for_selector(".guest-head .state.good")
    page.keyboard.press("f")
    page.fill("dialog input[name=fork]", "child")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-job=fork][data-state=done]")
    page.keyboard.press("t")
    page.click("tr[data-snapshot=web-ready] [data-action=restore]")
    page.wait_for_selector("[data-job=restore][data-state=done]")
    page.keyboard.press("g")
    page.wait_for_selector("tr[data-guest=child] .state.good")
    expect(page.locator("tr[data-guest] .state.good")).to_have_count(3)
    shoot(page, "copies")
    with _receiver(folder) as address:
        page.click("tr[data-guest=child] td.name a")
        page.wait_for_selector(".guest-head [data-action=migrate]")
        page.keyboard.press("m")
        page.fill("dialog input[name=address]", address)
        page.keyboard.press("Enter")
        page.wait_for_selector("[data-job=migrate][data-state=done]")
        shoot(page, "moved")
    page.keyboard.press("g")
    page.wait_for_selector("tr[data-guest=child] .state.idle")


@contextlib.contextmanager
def _receiver(folder: Path) -> Iterator[str]:
    """Another host's: a runtime folder of its own."""
    runtime = folder / "there"
    runtime.mkdir(mode=0o700)
    environment, address = {**os.environ, "OSTLER_RUNTIME": str(runtime)}, f"unix:{folder / 'in.sock'}"
    command = [*OSTLER, "receive", "--once", address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as ran:
        try:
            assert ran.stderr is not None
            assert "listen" in ran.stderr.readline()
            yield address
            assert ran.wait(60) == 0
        finally:
            ran.kill()
            _remove_guests(environment)


def _look_around(browser: Browser, page: Page, token: str) -> None:
    page.keyboard.press("a")
    page.wait_for_selector(".activity table")
    shoot(page, "activity")
    type_at_once(page, "gj")
    page.wait_for_selector("tr.selected")
    shoot(page, "host")
    page.keyboard.press("Enter")
    page.wait_for_selector(".charts.two")
    shoot(page, "guest")
    page.keyboard.press("?")
    page.wait_for_selector("dialog kbd")
    shoot(page, "keys")
    page.keyboard.press("Escape")
    for name, options in (
        ("host-dark", {"viewport": {"width": 1360, "height": 860}, "color_scheme": "dark"}),
        ("host-phone", {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}),
    ):
        other = browser.page(**options)
        sign_in(other, token)
        await_points(other)
        shoot(other, name)
        assert other.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        other.goto(f"{browser.address}/#/guest/web/charts")
        await_points(other)
        shoot(other, name.replace("host", "guest"))
        assert other.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        other.context.close()
