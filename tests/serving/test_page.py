"""The chat page: what it is made of, and, in a headless Chromium, that a person can talk through it.

The browser is Debian's, installed where it is missing and that may be, and driven through playwright. Screenshots go to
.ci/out/.
"""

import os
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
from gptoss_launch.launch.api.page import policy
from gptoss_launch.launch.keys import KEYS_VARIABLE, read_keys
from scripted import Application, Paced, listening

HTML = (files("gptoss_launch.launch.api") / "page.html").read_text(encoding="utf-8")
OUT = Path(__file__).parents[2] / ".ci" / "out"
THINKS = "<|channel|>analysis<|message|>The user says hello.<|end|><|start|>assistant"
SAYS = "<|channel|>final<|message|>Hello <b>there</b>, <script>window.broken = 1</script>world<|return|>"
CALLS = (
    "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather"
    ' <|constrain|>json<|message|>{"city": "Bern"}<|call|>'
)
TOOLS = '[{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]'


def test_the_page_needs_nothing_from_elsewhere():
    assert not re.findall(r"https?://|//[a-z]|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")", HTML)
    assert not re.findall(r"\son[a-z]+=|style=|innerHTML|eval\(|localStorage|document\.cookie", HTML)
    assert len(re.findall("<script", HTML)) == len(re.findall("<style", HTML)) == 1
    assert set(re.findall(r'(?:fetch|get)\("([^"]+)"', HTML)) == {"/v1/models", "/plan", "/v1/chat/completions"}


def test_its_policy_allows_what_is_in_it_and_nothing_else():
    rules = dict(rule.split(" ", 1) for rule in policy(HTML).split("; "))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules["script-src"])
    assert "unsafe" not in policy(HTML)
    with pytest.raises(ValueError):
        policy(HTML + "<script>more()</script>")


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def browser(skip_or_fail):
    chromium = find_chromium()
    if chromium is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (("update", "-qq"), ("install", "-y", "-qq", "--no-install-recommends", "chromium")):
            subprocess.run(["apt-get", *command], env=environment, check=False, capture_output=True)
        chromium = find_chromium()
    if chromium is None:
        skip_or_fail("no chromium: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip_or_fail("no playwright: pip install playwright")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # the tests run as root
        yield started
        started.close()


@pytest.mark.slow
def test_a_person_talks_through_the_page(browser, tokenizer, tiny_plan, markup):
    engine = Paced(markup(THINKS + SAYS), token_s=0.02)
    keys = read_keys(None, {KEYS_VARIABLE: "the-key"})
    OUT.mkdir(parents=True, exist_ok=True)
    with listening(Application(engine, tokenizer, tiny_plan, keys=keys)) as port:
        page = browser.new_page(viewport={"width": 900, "height": 700})
        page.set_default_timeout(20_000)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_text("wrong or missing API key").wait_for()
        page.fill("#key", "the-key")
        page.press("#key", "Tab")
        page.locator("#model", has_text="tiny").wait_for()
        assert page.evaluate("[sessionStorage.getItem('key'), localStorage.length]") == ["the-key", 0]
        page.click("#plan summary")
        page.locator("#plan td", has_text=tiny_plan.digest).wait_for()
        page.click("#plan summary")

        # Streamed: the beginning is there while the end is not; markup from the model stays text.
        page.fill("#message", "Hello")
        page.press("#message", "Enter")
        said = page.locator("article.assistant > .text")
        page.locator("article.assistant > .text", has_text="Hello").wait_for()
        assert page.locator("#stop").is_visible() and "world" not in said.inner_text()
        page.locator("#send").wait_for()
        assert said.inner_text() == "Hello <b>there</b>, <script>window.broken = 1</script>world"
        assert page.evaluate("window.broken") is None
        assert re.fullmatch(r"\d+ tokens · \d+\.\d tokens/s", page.locator(".figures").inner_text())

        # The reasoning is folded until somebody unfolds it.
        thought = page.locator("details.reasoning .text")
        assert not thought.is_visible()
        page.click("details.reasoning summary")
        assert thought.is_visible() and thought.inner_text() == "The user says hello."
        page.screenshot(path=OUT / "page.png")

        # A tool call is shown, its result goes back, and the conversation holds all of it.
        engine.script = markup(CALLS)
        page.click("form summary")
        page.fill("#tools", TOOLS)
        page.fill("#message", "Weather?")
        page.click("#send")
        call = page.locator(".call")
        page.get_by_text("Send results").wait_for()
        assert call.locator("strong").inner_text() == "get_weather" and '{"city": "Bern"}' in call.inner_text()
        engine.script = markup(SAYS)
        page.fill(".result", "rain")
        page.click("text=Send results")
        page.locator("article.assistant").nth(2).wait_for()
        page.locator("#send").wait_for()
        prompt = tokenizer.decode(engine.asked[-1].prompt_tokens)
        assert "Hello there" not in prompt and "Hello <b>there</b>" in prompt and "I look." in prompt
        assert "functions.get_weather to=assistant<|channel|>commentary<|message|>rain" in prompt
        page.screenshot(path=OUT / "page-tools.png")

        # Stopped: what came stays, and the engine is told.
        engine.script = markup("<|channel|>final<|message|>" + "on and on " * 100 + "<|return|>")
        page.fill("#message", "Go on")
        page.press("#message", "Enter")
        last = page.locator("article.assistant").last
        last.get_by_text("on and on").wait_for()
        page.click("#stop")
        last.get_by_text("stopped").wait_for()
        for _ in range(100):
            if engine.running == 0:
                break
            page.wait_for_timeout(50)
        assert engine.running == 0 and len(last.inner_text()) < 900
        page.click("#clear")
        assert page.locator("article").count() == 0
        assert [problem for problem in problems if "/v1/chat/completions" not in problem] == []
