"""The page in Chromium, in front of a fake server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import chromium, playground
from fake_stream import StreamingFake, kinds_of

pytestmark = pytest.mark.browser

MARKUP = [
    "<img src=x onerror='window.hacked=1'>",
    "<script>window.hacked=1</script>",
    "&amp;</div>",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def address(one_fake: StreamingFake) -> Iterator[str]:
    with playground("--url", one_fake.url) as found:
        yield found


@pytest.fixture
def page(fake: StreamingFake, address: str, browser: Any) -> Iterator[Any]:
    """The page, opened; it may ask nobody but its own server, and throw nothing."""
    context = browser.new_context()
    opened = context.new_page()
    asked, thrown = [], []
    opened.on("request", lambda request: asked.append(urlsplit(request.url).netloc))
    opened.on("pageerror", lambda error: thrown.append(str(error)))
    opened.on("console", lambda said: thrown.append(said.text) if said.type == "error" else 0)
    opened.goto(address)
    opened.wait_for_selector("#served li")
    yield opened
    context.close()
    assert set(asked) == {urlsplit(address).netloc} and not thrown


def run(page: Any, prompt: str = "Why?") -> None:
    page.fill("#prompt", prompt)
    page.click("#run")
    done(page)


def done(page: Any) -> None:
    page.wait_for_selector("#run:enabled", timeout=30_000)


def figure(page: Any, column: str, name: str) -> str:
    text: str = page.inner_text(f"#{column} [data-figure={name}]")
    return text


def kinds(page: Any, column: str) -> str:
    spans = page.query_selector_all(f"#{column} .turn:last-child .token")
    return "".join(span.get_attribute("data-kinds") for span in spans)


def test_both_answers_with_tints_underlines_and_figures(page: Any, fake: StreamingFake) -> None:
    run(page)
    assert [asked["vllm_xargs"]["lora_drop_k"] for asked in fake.asked] == [0, 3, 0, 0]
    text = "".join(fake.words[token] for token in fake.tokens)
    for column, k in (("base", 0), ("lora", 3)):
        assert page.text_content(f"#{column} .answer") == text
        assert kinds(page, column) == kinds_of(k, len(fake.tokens))
        tinted = page.query_selector_all(f"#{column} .token.lora")
        assert len(tinted) == kinds_of(k, len(fake.tokens)).count("L")
        unlikely = page.query_selector_all(f"#{column} .token.unlikely")
        assert [int(span.get_attribute("data-start")) for span in unlikely] == [1, 2, 3, 4, 6, 7]
        assert figure(page, column, "agreement") == "22 %"
    assert figure(page, "lora", "share") == "67 % 6 of 9"
    assert figure(page, "base", "share") == "0 % 0 of 9"
    assert figure(page, "lora", "kv") == "5 of 11"
    assert "×" in figure(page, "lora", "per_second")
    assert "6 of 9 tokens came of LoRA steps" in page.get_attribute("#lora canvas", "aria-label")
    assert page.evaluate(
        "getComputedStyle(document.querySelector('#lora .token.lora')).backgroundColor"
    ) != page.evaluate("getComputedStyle(document.querySelector('#lora .token')).backgroundColor")


def test_what_a_model_writes_is_text(page: Any, fake: StreamingFake) -> None:
    fake.words[5:8] = MARKUP
    run(page, MARKUP[0])
    assert "".join(MARKUP[:2]) in page.text_content("#lora .answer")
    page.hover("#lora .token >> nth=2")
    assert MARKUP[1].replace(" ", "·") in page.text_content("#card")
    page.click("summary")
    page.click("#python")
    page.wait_for_selector("#code[open]")
    assert MARKUP[0] in page.text_content("#code pre")
    assert page.query_selector("main img, main script, dialog img, #card script") is None
    assert page.evaluate("window.hacked") is None


def test_hovering_shows_the_base_models_five_best(page: Any) -> None:
    run(page)
    page.hover("#lora .token >> nth=1")
    card = page.inner_text("#card")
    assert "LoRA step" in card and "base model: 0.1 %, its 6th choice" in card
    rows = [row.inner_text().split("\n") for row in page.query_selector_all("#card li")]
    assert [row[0] for row in rows] == ["·the", "·a", "·of", "·and", "·to"]
    assert [row[1] for row in rows] == ["60 %", "20 %", "10 %", "5.0 %", "2.0 %"]
    page.hover("h1")
    assert page.is_hidden("#card")


def test_keys_alone_are_enough(page: Any) -> None:
    page.focus("#prompt")
    page.keyboard.type("Why?")
    page.keyboard.press("Enter")
    done(page)
    page.focus("#lora .answer")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.text_content("#lora .token.current") == " sky"
    assert page.inner_text("#status").startswith("sky; LoRA step: layers skipped; the base model")
    page.keyboard.press("Escape")
    assert page.is_hidden("#card")


def test_what_a_screen_reader_finds(page: Any) -> None:
    run(page)
    names = page.locator("main").aria_snapshot()
    for name in (
        'textbox "Prompt"',
        'slider "LoRA steps per full step:": "3"',
        'button "Run"',
        'button "Stop" [disabled]',
        'region "Base model"',
        'region "LoRA-Drop"',
        'group "Answer of LoRA-Drop; arrow keys go from token to token"',
        'img "Time between tokens: half within',
    ):
        assert name in names, name
    assert "LoRA-Drop: 9 tokens, 6 of them by LoRA steps" in page.inner_text("#status")


def test_a_conversation_goes_on_with_each_columns_own_answers(
    page: Any, fake: StreamingFake
) -> None:
    run(page, "First?")
    fake.tokens = [5, 6]
    run(page, "Second?")
    answer = "".join(fake.words[token] for token in (0, 5, 6, 7, 3, 0, 8, 9, 1))
    assert fake.asked[-3]["messages"] == [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Second?"},
    ]
    assert len(page.query_selector_all("#lora .turn")) == 2
    page.click("#new")
    assert not page.query_selector_all(".turn")
    run(page, "Third?")
    assert len(fake.asked[-3]["messages"]) == 1


def test_stop_hangs_up_and_scores_what_is_there(page: Any, fake: StreamingFake) -> None:
    fake.tokens, fake.pause = fake.tokens * 50, 0.2  # a minute and a half, unless stopped
    page.fill("#prompt", "Why?")
    page.click("#run")
    page.wait_for_selector("#base .token:nth-child(5)")
    page.click("#stop")
    done(page)
    assert fake.hung_up.wait(20)
    assert "Stopped." in page.inner_text("#base .turn")
    assert page.query_selector_all("#base .token.unlikely")
    assert len(page.query_selector_all("#base .token")) < 450
    fake.tokens, fake.pause = [5, 6], 0
    run(page, "Again?")  # a turn that one side never answered is no part of the conversation
    assert len(fake.asked[-3]["messages"]) == 1


def test_errors_are_told_where_the_answer_would_be(page: Any, fake: StreamingFake) -> None:
    fake.refusal = "This model's maximum context length is 512 tokens."
    run(page)
    for column in ("base", "lora"):
        assert page.inner_text(f"#{column} [role=alert]") == (
            f"The server refuses this request: {fake.refusal}"
        )
    assert page.input_value("#prompt") == "Why?"
    fake.refusal, fake.gone = "", True
    run(page)
    assert "does not answer" in page.inner_text("#lora .turn:last-child [role=alert]")


def test_a_link_holds_the_settings(page: Any, fake: StreamingFake, browser: Any) -> None:
    page.click("summary")
    page.fill("#prompt", "A & B = ü?")
    for name, value in (("k", "1"), ("temperature", "0.7"), ("max_tokens", "5"), ("seed", "3")):
        page.fill(f"#{name}", value)
    page.check("#side")
    page.click("#link")
    address = page.text_content("#code pre")
    other = browser.new_page()
    other.goto(address)
    other.wait_for_selector("#served li")
    assert other.input_value("#prompt") == "A & B = ü?" and other.is_checked("#side")
    assert other.input_value("#k") == "1" and other.inner_text("#k-value") == "1"
    run(other, "A & B = ü?")
    asked = next(a for a in fake.asked if a.get("vllm_xargs", {}).get("lora_drop_k") == 1)
    assert (asked["temperature"], asked["max_tokens"], asked["seed"]) == (0.7, 5, 3)
    other.reload()
    other.wait_for_selector("#served li")
    assert other.input_value("#temperature") == "0.7" and not other.is_checked("#plain")
    other.close()


def test_side_by_side_asks_both_at_once(page: Any, fake: StreamingFake) -> None:
    fake.tokens, fake.pause = fake.tokens * 50, 0.2
    page.click("summary")
    assert page.is_hidden("#side-note")
    page.check("#side")
    assert "every step is full" in page.inner_text("#side-note")
    page.fill("#prompt", "Why?")
    page.click("#run")
    page.wait_for_selector("#lora .token")
    assert page.query_selector("#base .waiting")
    page.click("#stop")
    done(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_scroll_one_way_only(page: Any, fake: StreamingFake, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 700})
    fake.words[5] = "w" * 90
    run(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) > 384) == (scheme == "light")


def test_tokens_that_came_together_stand_apart_once_scored(page: Any, fake: StreamingFake) -> None:
    """A slow reader gets several tokens in one chunk; characters may span several tokens."""
    fake.together = [(0, 5, 6), (7,), (3, 0)]
    fake.tokens = [0, 5, 6, 7, 3, 0]
    run(page)
    assert page.text_content("#lora .answer") == "".join(fake.words[t] for t in fake.tokens)
    assert len(page.query_selector_all("#lora .token")) == 6
    assert kinds(page, "lora") == kinds_of(3, 6)
    deadline = time.monotonic() + 10
    while not page.query_selector("#lora .token.unlikely") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert page.query_selector("#lora .token.unlikely")
