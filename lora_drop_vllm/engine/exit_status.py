"""A server whose engine died exits with an error, so that a supervisor starts it again.

Patches `build_and_serve` of vLLM's API server, in the process of `vllm serve --model-impl
lora_drop`. Reason: with one API server vLLM ends with status 0 then, as if it had been told to
stop. Removal condition: vLLM ends with another status.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

ENTRY = "vllm.entrypoints.launchers.api_server.entry"


def install() -> None:
    """Raise where this process's server ends because of its engine; harmless when called twice."""
    entry = sys.modules.get(ENTRY)
    if entry is None or getattr(entry.build_and_serve, "lora_drop", False):
        return  # the former: this process serves nobody
    original = entry.build_and_serve

    @wraps(original)
    async def build_and_serve(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        ending = await original(engine_client, *args, **kwargs)
        # one that was told to stop ends by the HTTP server's `shutdown`, after its engine
        if ending.__name__ != "shutdown" and engine_client.errored:
            ending.close()
            raise EngineDeadError()
        return ending

    build_and_serve.lora_drop = True  # type: ignore[attr-defined]
    entry.build_and_serve = build_and_serve
