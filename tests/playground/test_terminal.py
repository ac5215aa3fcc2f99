"""The playground without a browser, its numbers, and what it refuses to work with."""

from __future__ import annotations

import io
import socket
from typing import Any

import pytest

pytest.importorskip("openai")

from fake_stream import StreamingFake

from lora_drop_vllm.cli import main
from lora_drop_vllm.playground.answers import Answer, Piece, Sampling
from lora_drop_vllm.playground.served import look
from lora_drop_vllm.playground.terminal import LORA, RESET, compare, printable
from lora_drop_vllm.server_process import Endpoint


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def answer_of(*pieces: tuple[str, float | None], kv_skips: bool = True) -> Answer:
    answer = Answer(kv_skips, prompt_ids=(1, 2, 3, 4))
    for kinds, ms in pieces:
        answer.add(Piece("x", tuple(range(len(kinds))), kinds, ms, None))
    return answer


def test_numbers_of_an_answer() -> None:
    steps = [("F", None), ("L", 10.0), ("L", 12.0), ("L", 11.0), ("F", 30.0), ("L", 9.0)]
    summary = answer_of(*steps).summary()
    assert (summary.tokens, summary.full, summary.lora) == (6, 2, 4)
    assert (summary.p50_ms, summary.p95_ms) == (11.0, 30.0)
    assert summary.per_second == pytest.approx(5 / 0.072)
    assert (summary.kv_written, summary.kv_stock) == (4 + 1, 4 + 5)
    assert answer_of(*steps, kv_skips=False).summary().kv_written == 9


def test_tokens_that_come_together_share_their_time() -> None:
    summary = answer_of(("F", None), ("LL", 10.0), ("L", 20.0)).summary()
    assert (summary.p50_ms, summary.p95_ms) == (5.0, 20.0)
    assert summary.per_second == pytest.approx(3 / 0.03)


def test_an_answer_without_a_second_token_has_no_speed() -> None:
    for answer in (answer_of(), answer_of(("F", None))):
        summary = answer.summary()
        assert summary.per_second is summary.p50_ms is summary.p95_ms is None
        assert summary.kv_written == summary.kv_stock == 4


def test_control_characters_of_a_model_reach_no_terminal() -> None:
    assert printable("a\033[31mb\x07\r\n\té") == "a\ufffd[31mb\ufffd\ufffd\n\té"


def show(fake: StreamingFake, out: io.StringIO) -> Any:
    endpoint = Endpoint.at(fake.url)
    return compare(endpoint, look(endpoint), "Why?", 3, Sampling(), out)


def test_a_terminal_shows_both_answers(fake: StreamingFake, monkeypatch: Any) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    base, ours = show(fake, out)
    assert [asked["vllm_xargs"].get("lora_drop_k") for asked in fake.asked] == [0, 0, 3, 0]
    assert "L" not in "".join(p.kinds for p in base.answer.pieces)
    text = out.getvalue()
    assert text.count(LORA) == ours.answer.lora == 6
    assert f"{LORA} sky{RESET}{LORA} is{RESET}" in text
    assert "6 tokens that the base model finds unlikely" in text
    assert "   2 LoRA" in text and "0.1%, its choice ' the' 60.0%" in text
    assert "22.2%" in text and "5 of 11" in text


def test_a_pipe_gets_no_colours(fake: StreamingFake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["playground", "--url", fake.url, "--text", "Why?", "--max-tokens", "7"]) == 0
    text = capsys.readouterr().out
    assert "\033" not in text and " <b>blue</b>" in text and "LoRA-Drop, k = 3" in text
    assert fake.asked[0]["max_tokens"] == 7


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["playground", *arguments]) == 2
    return capsys.readouterr().err


def test_servers_that_it_refuses(
    fake: StreamingFake, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fake.info is not None
    fake.info["least_k"] = "none"
    assert "lora_drop.request_k" in refusal(capsys, "--url", fake.url)
    fake.info = None
    assert "too old" in refusal(capsys, "--url", fake.url)
    monkeypatch.setattr(fake, "steps", {})
    message = refusal(capsys, "--url", fake.url)
    assert "does not run LoRA-Drop" in message and "--model-impl lora_drop" in message
    assert "no OpenAI-compatible server answers" in refusal(capsys, "--url", "http://127.0.0.1:1")


def test_a_taken_port_is_known_before_anything_starts(capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = refusal(capsys, "./no-model", "--untrained", "--port", port)
    assert f"--port {port}: cannot listen there" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./model"], "needs --adapter DIR"),
        (["./model", "--url", "http://localhost:1"], "that server has its model"),
        (["--adapter", "d", "--url", "http://localhost:1"], "that server has its adapter"),
    ],
)
def test_command_lines_without_sense(arguments: list[str], message: str, capsys: Any) -> None:
    assert message in refusal(capsys, *arguments)


def test_a_missing_extra_is_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_drop_vllm.playground.launch.NEEDED", ("fastapi", "no_such_package"))
    message = refusal(capsys, "--url", "http://localhost:1")
    assert "needs no_such_package; pip install 'lora_drop_vllm[playground]'" in message
