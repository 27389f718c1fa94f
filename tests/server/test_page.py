"""The page in headless Chromium: the chat answers, the timeline moves, no error is logged, small screens fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.live import Live, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "a-key-of-some-length"
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
MILLISECONDS = 30_000

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, live: Live) -> Iterator[Any]:
    """The open page of a running server; what it logs as warning or error fails the test."""
    page, complaints = open_page(browser)
    page.goto(live.url)
    yield page
    assert complaints == []
    page.close()


def open_page(browser: Any) -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(MILLISECONDS)
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return page, complaints


def pixels(page: Any, canvas: str) -> str:
    drawn: str = page.evaluate("id => document.getElementById(id).toDataURL()", canvas)
    return drawn


def ask(page: Any, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    num = page.locator(".timings").count()
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator(".timings").nth(num).wait_for()


def test_the_chat_answers_and_says_why_it_took_so_long(page: Any, live: Live) -> None:
    page.click("#settings summary")
    page.fill("#max_tokens", "12")
    page.fill("#seed", "3")
    ask(page, "one two")
    answers = page.locator(".message.assistant")
    first = answers.nth(0).inner_text()
    assert first
    ask(page, "three")
    assert answers.count() == 2
    line = page.locator(".timings").nth(1)
    assert "12 tokens in" in line.inner_text()
    line.get_by_text("why?").click()
    line.locator("p").first.wait_for()
    assert "Its prompt of" in line.inner_text()
    page.click("#clear")
    assert page.locator(".message").count() == 0
    page.fill("#temperature", "0")
    ask(page, "four")
    page.click("#clear")
    ask(page, "four")
    live.wait_idle()


def test_the_timeline_moves_and_a_step_tells_its_details(page: Any, live: Live) -> None:
    page.wait_for_function("() => document.getElementById('state').textContent === 'idle'")
    before = {canvas: pixels(page, canvas) for canvas in ("steps", "ttft", "itl")}
    live.post("/v1/completions", prompt=[[5] * 70, [6] * 20], max_tokens=20, ignore_eos=True)
    for canvas, drawn in before.items():
        page.wait_for_function("([id, old]) => document.getElementById(id).toDataURL() !== old", arg=[canvas, drawn])
    page.press("#steps", "PageUp")
    detail = page.locator("#detail")
    assert detail.inner_text().startswith("Step ")
    detail.locator(".chip").first.click()
    page.wait_for_function("() => document.getElementById('detail').textContent.includes('took')")
    assert not page.is_checked("#follow")


def test_running_requests_and_their_blocks_are_shown(page: Any, live: Live) -> None:
    """While an answer comes: its row, and the blocks that it uses."""
    page.wait_for_function("() => document.getElementById('state').textContent === 'idle'")
    blocks = pixels(page, "blocks")
    with live.client.stream(
        "POST", "/v1/completions", json={"prompt": [9] * 20, "max_tokens": 230, "stream": True, "ignore_eos": True}
    ) as answer:
        next(answer.iter_lines())
        page.wait_for_function("old => document.getElementById('blocks').toDataURL() !== old", arg=blocks)
    page.wait_for_function("() => document.getElementById('state').textContent === 'idle'")
    assert page.locator("#requests").inner_text() == "no request runs"
    assert int(page.locator("#cached").inner_text().split()[0]) > 0
    live.wait_idle()


def test_an_answer_can_be_stopped(page: Any, live: Live) -> None:
    page.fill("#prompt", "go on")
    page.click("#send")
    page.wait_for_function("() => document.querySelector('.message.assistant')?.textContent.length > 0")
    page.click("#send")
    page.wait_for_function("() => document.getElementById('send').textContent === 'Send'")
    live.wait_idle()


def test_another_server_at_the_same_address_is_asked_for_all_its_steps(page: Any, live: Live) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/insight/feed" in request.url else None)

    def next_asked(num: int) -> list[str]:
        del asked[:]
        while len(asked) < num:
            page.wait_for_event("request")
        return asked[:num]

    page.click("#settings summary")
    page.fill("#max_tokens", "2")
    ask(page, "one")
    assert not next_asked(3)[-1].endswith("since=-1")
    live.service.created += 1
    assert any(url.endswith("since=-1") for url in next_asked(4))


@pytest.mark.parametrize("width", [320, 390, 768, 1024])
def test_no_screen_is_too_small(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("#prompt", "#send", "#steps", "#requests", "#blocks", "#ttft", "#itl"):
        box = page.locator(name).bounding_box()
        assert box is not None and box["width"] > 40 and box["x"] + box["width"] <= width


def test_a_locked_server_asks_for_its_key(browser: Any) -> None:
    with serving(keys=[KEY]) as live:
        page, _ = open_page(browser)
        page.goto(live.url)
        page.locator("#key").wait_for()
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.wait_for_function("() => document.getElementById('state').textContent === 'idle'")
        assert page.locator("#key-form").is_hidden()
        ask(page, "one")
        page.close()
