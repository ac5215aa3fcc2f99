"""The exit status of a server whose engine died: an error, so that a supervisor restarts it.

Patches `build_and_serve` of vLLM's API server, in the process of `vllm serve --model-impl
lora_drop`. Reason: with one API server, vLLM then ends with status 0, as after a requested stop.
Removal condition: vLLM ends with another status.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

ENTRY = "vllm.entrypoints.launchers.api_server.entry"


def install() -> None:
    """Makes a server raise whose engine died; a second call changes nothing."""
    entry = sys.modules.get(ENTRY)
    if entry is None or getattr(entry.build_and_serve, "lora_drop", False):
        return  # without an entry, this process is no server
    original = entry.build_and_serve

    @wraps(original)
    async def build_and_serve(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        ending = await original(engine_client, *args, **kwargs)
        # after a requested stop, what is left to do is the HTTP server's `shutdown`
        if ending.__name__ != "shutdown" and engine_client.errored:
            ending.close()
            raise EngineDeadError()
        return ending

    build_and_serve.lora_drop = True  # type: ignore[attr-defined]
    entry.build_and_serve = build_and_serve
