"""A question as a command line and as a program, for "copy as"."""

from __future__ import annotations

import json
import shlex
from pprint import pformat

from lora_drop_vllm.playground.answers import EXTENSIONS, Question

KEY = "$OPENAI_API_KEY"  # expanded by the reader's shell; a key is never written out


def as_curl(question: Question, url: str, model: str, with_key: bool) -> str:
    """A `curl` command that streams the answer.

    Args:
        url: of the server, without `/v1`
        with_key: whether the server wants a key
    """
    body = json.dumps(question.body(model), ensure_ascii=False)
    lines = [
        f"curl --no-buffer {shlex.quote(f'{url}/v1/{question.route}')}",
        "--header 'Content-Type: application/json'",
        *([f'--header "Authorization: Bearer {KEY}"'] if with_key else []),
        f"--data {shlex.quote(body)}",
    ]
    return " \\\n  ".join(lines)


def as_python(question: Question, url: str, model: str) -> str:
    """A program with the OpenAI client that prints the answer, then the kinds of its steps."""
    body = question.body(model)
    extra = {name: body.pop(name) for name in EXTENSIONS}
    arguments = "".join(f"    {name}={pformat(value)},\n" for name, value in body.items())
    call = "completions" if question.plain else "chat.completions"
    text = "choice.text" if question.plain else 'choice.delta.content or ""'
    return f"""import os

from openai import OpenAI

client = OpenAI(base_url={f"{url}/v1"!r}, api_key=os.environ.get("OPENAI_API_KEY", "none"))
answer = client.{call}.create(
{arguments}    extra_body={extra!r},
)
kinds = ""
for chunk in answer:
    for choice in chunk.choices:
        print({text}, end="", flush=True)
        kinds += getattr(choice, "lora_drop_steps", "")
print()
print(kinds)  # a letter a token: F for a full step, L for a LoRA step
"""
