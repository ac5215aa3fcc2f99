"""Kind of the step that gave each token, for requests that ask for it.

A request asks by `"vllm_xargs": {"lora_drop_steps": 1}`. In a streamed answer of the chat and the
completions route each choice then has `lora_drop_steps` beside its `token_ids`, one letter per
token: F for a full step, L for a LoRA step. An answer that is not streamed, and the Python API's
`RequestOutput`, have all letters under the same name in `kv_transfer_params`.

The scheduler still has the plan of a step when its outputs come back, so asynchronous scheduling
and preemption need no special case. The letters travel in `EngineCoreOutput.kv_transfer_params`, a
dict for connectors, which LoRA-Drop refuses. vLLM hands it to the API server that has the request,
however many servers and engines there are. If vLLM merges several outputs, it keeps the last dict
only; each therefore carries the letters of all tokens so far.

Patches `chat_completion_stream_generator` and `completion_stream_generator`, in the API server's
process and for requests that ask. Reason: streamed chunks have no field that a plugin may fill.
Removal condition: vLLM streams `kv_transfer_params`, or gives chunks such a field.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from lora_drop_vllm.config import LoRADropConfig
from lora_drop_vllm.engine.exit_status import ENTRY
from lora_drop_vllm.method.adapter_folder import shown
from lora_drop_vllm.method.schedule import StepKind

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.request import Request

FIELD = "lora_drop_steps"
LETTERS = {StepKind.FULL: "F", StepKind.LORA: "L"}


def asked(extra_args: Mapping[str, Any] | None) -> bool:
    """True if a request with these `vllm_xargs` asks for the kinds of its steps."""
    return bool((extra_args or {}).get(FIELD))


def check(params: SamplingParams, config: LoRADropConfig) -> None:
    """Refuses a request that asks for what this server cannot report.

    Raises:
        ValueError: naming the parameter and the way out.
    """
    value = (params.extra_args or {}).get(FIELD, 0)
    if value not in (0, 1):
        raise ValueError(f"vllm_xargs.{FIELD}={shown(value)}: expected 1 (report the steps) or 0.")
    if value and not config.active:
        raise ValueError(
            f"vllm_xargs.{FIELD}=1: LoRA-Drop is off on this server (k=0, or no drop layer), so "
            "every step is full; leave it out."
        )
    if value and params.n > 1:
        raise ValueError(
            f"vllm_xargs.{FIELD}=1: cannot be combined with n={params.n}; send {params.n} requests "
            "of one answer each."
        )


class StepKinds:
    """The letters of every unfinished request that asked, in the scheduler's process."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._letters)

    def watch(self, request: Request) -> None:
        """Starts with a request that asks; a preempted one keeps its letters."""
        if request.sampling_params and asked(request.sampling_params.extra_args):
            self._letters.setdefault(request.request_id, "")

    def report(
        self, outputs: Mapping[int, EngineCoreOutputs], kind: StepKind, alive: Container[str]
    ) -> None:
        """Adds the letters to the outputs of one step, and forgets the requests that ended.

        Args:
            outputs: outputs of the step, by client
            alive: ids of the requests that the scheduler still has
        """
        if not self._letters:
            return
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.request_id in self._letters and output.new_token_ids:
                    letters = LETTERS[kind] * len(output.new_token_ids)
                    self._letters[output.request_id] += letters
                    output.kv_transfer_params = {FIELD: self._letters[output.request_id]}
        for ended in [name for name in self._letters if name not in alive]:
            del self._letters[ended]


class _Chunks:
    """Letters of one streamed answer, from the engine's outputs to the chunks."""

    def __init__(self, request: Any) -> None:
        self.choices_per_prompt = request.n or 1
        self.num_seen: defaultdict[int, int] = defaultdict(int)  # tokens, by choice
        self.pending: defaultdict[int, str] = defaultdict(str)

    async def watch(self, results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Passes the results on; in the completions route each comes with its prompt's number."""
        async for item in results:
            prompt, result = item if isinstance(item, tuple) else (0, item)
            letters = (result.kv_transfer_params or {}).get(FIELD, "")
            for output in result.outputs:
                choice = output.index + prompt * self.choices_per_prompt
                start = self.num_seen[choice]
                self.num_seen[choice] += len(output.token_ids)
                self.pending[choice] += letters[start : self.num_seen[choice]]
            yield item

    def label(self, event: str) -> str:
        """The server-sent event, with letters beside its token ids."""
        if not event.startswith("data: {"):
            return event
        chunk = json.loads(event.removeprefix("data: "))
        for choice in chunk.get("choices", ()):
            if choice.get("token_ids"):
                choice[FIELD] = self.pending.pop(choice["index"], "")
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def streaming(original: Callable[..., Any]) -> Callable[..., Any]:
    """A route's stream generator that reports the kinds of the steps to requests that ask."""
    signature = inspect.signature(original)

    async def labelled(chunks: _Chunks, *args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
        async for event in original(*args, **kwargs):
            yield chunks.label(event)

    @wraps(original)
    def stream(self: Any, request: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
        if not asked(request.vllm_xargs):
            events: AsyncGenerator[str, None] = original(self, request, *args, **kwargs)
            return events
        request.return_token_ids = True  # the letters stand beside them
        call, chunks = signature.bind(self, request, *args, **kwargs), _Chunks(request)
        call.arguments["result_generator"] = chunks.watch(call.arguments["result_generator"])
        return labelled(chunks, *call.args, **call.kwargs)

    stream.lora_drop = True  # type: ignore[attr-defined]
    return stream


def install() -> None:
    """Labels the streams of this process's HTTP server, if any; calling it twice is harmless."""
    if ENTRY not in sys.modules:
        return
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    for route, name in (
        (OpenAIServingChat, "chat_completion_stream_generator"),
        (OpenAIServingCompletion, "completion_stream_generator"),
    ):
        original = getattr(route, name)
        if not getattr(original, "lora_drop", False):
            setattr(route, name, streaming(original))
