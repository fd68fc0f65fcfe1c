"""The page in a real browser: a chat turn streams, light and dark, on a phone and on a desk."""

from __future__ import annotations

import re
import time
from shutil import which
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from edgeslm.runtime.server import PAGE, read_page
from tests.runtime.browser import Browser
from tests.runtime.fakes import FakeRunner
from tests.runtime.live import live, service_of

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
TURNS = "document.querySelectorAll('.assistant').length"
TEXT = "document.querySelector('.assistant').textContent"


def test_the_page_asks_nobody_else() -> None:
    page, headers = read_page()
    assert not re.search(r"https?://|@import|url\(", page)
    assert len(PAGE.read_bytes()) < 20_000
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1200, 800)])
@pytest.mark.parametrize("dark", [False, True])
def test_a_turn_streams(tmp_path: Path, width: int, height: int, dark: bool) -> None:
    answer = b"An answer <b>with</b> " + b"words " * 20
    runner = FakeRunner(answer, b"second", on_step=lambda _: time.sleep(0.005))
    assert CHROMIUM
    with live(service_of(runner)) as server, Browser(CHROMIUM, tmp_path) as browser:
        browser.show(server.url, width, height, dark=dark)
        browser.wait_for("document.querySelector('.note')")
        browser.evaluate("at('message').value = 'Question?'; at('ask').requestSubmit()")
        browser.wait_for(f"{TURNS} && {TEXT}.length > 3")
        assert len(browser.evaluate(TEXT)) < len(answer), "it comes in pieces"
        browser.wait_for("document.querySelector('.took')")
        assert browser.evaluate(TEXT) == answer.decode()
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", colour)[0]) < 100) is dark
        browser.evaluate("at('message').value = 'And?'; at('ask').requestSubmit()")
        browser.wait_for(f"{TURNS} === 2 && document.querySelectorAll('.took').length === 2")
        assert not browser.messages, browser.messages


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_key_is_asked_for_and_an_answer_can_be_stopped(tmp_path: Path) -> None:
    from edgeslm.runtime.http_io import read_keys

    keys = tmp_path / "keys"
    keys.write_text("open sesame\n")
    runner = FakeRunner(b"z" * 3000, on_step=lambda _: time.sleep(0.005))
    assert CHROMIUM
    service = service_of(runner, keys=read_keys(keys))
    with live(service) as server, Browser(CHROMIUM, tmp_path / "profile") as browser:
        browser.show(server.url, 390, 844, dark=False)
        browser.wait_for("!at('unlock').hidden")
        browser.evaluate("at('key').value = 'open sesame'; at('unlock').requestSubmit()")
        browser.wait_for("at('unlock').hidden && document.querySelector('.note')")
        browser.evaluate("at('message').value = 'Go'; at('ask').requestSubmit()")
        browser.wait_for(f"{TURNS} && {TEXT}.length > 3")
        browser.evaluate("at('ask').requestSubmit()")
        browser.wait_for("at('send').textContent === 'Send'")
        end = time.monotonic() + 10
        while server.service.worker.running:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert runner.steps < 2000
