"""A second record of the step kind that sampled each token, compared with what clients get."""

from __future__ import annotations

from typing import Any


class KindLedger:
    """Follows a dry engine; each of its requests then asks for the kinds of its steps.

    The record is kept by position. A token that preemption discarded is sampled again; only the
    last step that sampled it counts.

    Attributes:
        told: the kinds that each request's client got, one letter per token
    """

    def __init__(self, engine: Any) -> None:
        self.told: dict[str, str] = {}
        self._engine = engine
        self._prompt_end: dict[str, int] = {}
        self._sampled_in: dict[tuple[str, int], str] = {}
        scheduler = engine.scheduler
        self._run, self._add, self._update = (
            engine._run,
            scheduler.add_request,
            scheduler.update_from_output,
        )
        engine._run, scheduler.add_request = self._running, self._adding
        scheduler.update_from_output = self._updating

    def _adding(self, request: Any) -> None:
        name, params = request.request_id, request.sampling_params
        params.extra_args = (params.extra_args or {}) | {"lora_drop_steps": 1}
        self.told[name], self._prompt_end[name] = "", request.num_prompt_tokens
        self._add(request)

    def _running(self, output: Any) -> Any:
        result = self._run(output)
        for name, tokens in zip(result.req_ids, result.sampled_token_ids):
            if tokens:
                last = len(self._engine.books[name].tokens) - 1
                self._sampled_in[name, last] = output.lora_drop.kind.value[0].upper()
        return result

    def _updating(self, *given: Any) -> Any:
        outputs = self._update(*given)
        for of_client in outputs.values():
            for output in of_client.outputs:
                self._receive(output)
        return outputs

    def _receive(self, output: Any) -> None:
        """Checks an output as its client gets it: it is right about every token so far."""
        name = output.request_id
        start = self._prompt_end[name]
        end = start + len(self.told[name]) + len(output.new_token_ids)
        if output.new_token_ids:
            self.told[name] = output.kv_transfer_params["lora_drop_steps"]
        right = "".join(self._sampled_in[name, position] for position in range(start, end))
        assert self.told[name] == right, "a token came with the kind of another step"
