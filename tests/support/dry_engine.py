"""vLLM's real scheduler and block pool under our hook, with books instead of a model.

The runner of these engines computes nothing. It records, slot by slot, what a model would write
into each KV block, and checks every plan against a second statement of the rules.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dry_scheduler import Setup, make_scheduler
from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

EOS = 2


@dataclass
class Books:
    """The runner's record of one request.

    Attributes:
        tokens: prompt and all sampled tokens
        chain: identity of the tokens up to each position
        prompt_end: positions below it are computed as a prompt
        written: per KV group, the identities of the tokens in the request's list
        deferred: steps that the request waited for a full step
    """

    tokens: list[int]
    k: int
    chain: list[int] = field(default_factory=list)
    prompt_end: int = 0
    computed: int = 0
    phase: int = 0
    written: list[list[int]] = field(default_factory=list)
    table: list[list[int]] = field(default_factory=list)
    deferred: int = 0

    def identify(self, end: int) -> None:
        """Extends `chain` to positions below `end`."""
        for t in range(len(self.chain), end):
            before = self.chain[-1] if self.chain else 0
            self.chain.append(hash((before, self.tokens[t])))


def next_token(chain: int) -> int:
    """The token sampled after the tokens of `chain`: one of a few, now and then the end."""
    return EOS if chain % 61 == 0 else 3 + chain % 3


class DryEngine:
    """An engine core whose steps keep books.

    Attributes:
        sent: tokens that each request's client got so far
        kinds: kinds of the steps so far
        num_preemptions, num_cached: preemptions and cached tokens so far
        num_deferred, num_prompted: steps so far that deferred a prompt, and that computed one
        longest_wait: steps that a prompt may wait, at most
    """

    def __init__(self, vllm_config: Any, setup: Setup) -> None:
        self.setup = setup
        self.scheduler, self.hasher = make_scheduler(vllm_config, setup)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.memory = [[None] * max(setup.group_sizes) for _ in range(setup.num_blocks)]
        self.books: dict[str, Books] = {}
        self.sent: dict[str, list[int]] = {}
        self.in_flight: deque[tuple[Any, Any]] = deque()
        self.numbers = itertools.count()
        self.kinds: list[str] = []
        self.num_preemptions = self.num_cached = self.num_deferred = self.num_prompted = 0
        self.longest_wait = setup.k
        self.slots = [0, 0]  # written, skipped

    @property
    def busy(self) -> bool:
        return bool(self.in_flight) or self.scheduler.has_requests()

    def add(
        self, prompt: list[int], max_tokens: int, k: int | None = None, priority: int = 0
    ) -> str:
        name = f"r{next(self.numbers)}"
        params = SamplingParams(
            max_tokens=max_tokens,
            stop_token_ids=[EOS],
            extra_args=None if k is None else {"lora_drop_k": k},
        )
        hasher = self.hasher if self.setup.prefix_caching else None
        request = Request(name, prompt[:], params, None, priority=priority, block_hasher=hasher)
        self.scheduler.add_request(request)
        self.books[name] = Books(list(prompt), self.setup.k if k is None else k)
        self.sent[name] = []
        return name

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self, wait: bool = False) -> None:
        """Schedules and runs a step; its output comes at once, or async when the next one runs.

        With `wait`, an asynchronous engine's output also comes at once.
        """
        before = self.waiting()
        output = self.scheduler.schedule()
        if self.scheduler.deferred:
            self._check_deferral(before & self.waiting(), output)
        self.in_flight.append((output, self._run(output)))
        ahead = self.setup.async_scheduling and output.total_num_scheduled_tokens and not wait
        while len(self.in_flight) > bool(ahead):
            outputs = self.scheduler.update_from_output(*self.in_flight.popleft())
            for result in outputs[0].outputs if outputs else ():
                self.sent[result.request_id] += result.new_token_ids
        for name in self.books.keys() - self.scheduler.requests.keys():
            del self.books[name]

    def waiting(self) -> set[str]:
        """Requests that no step has run yet, and preempted requests."""
        return self.books.keys() - {request.request_id for request in self.scheduler.running}

    def _check_deferral(self, names: set[str], output: Any) -> None:
        """Checks the rule about waiting prompts, in a step that left these out."""
        assert self.setup.prompts == "wait"
        assert output.num_scheduled_tokens or output.preempted_req_ids, "nobody decodes"
        short = all(len(self.books[r.req_id].tokens) == 1 for r in output.scheduled_new_reqs)
        assert short and not output.scheduled_cached_reqs.resumed_req_ids, "a prompt went ahead"
        assert output.lora_drop.kind.value == "lora" or output.scheduled_new_reqs
        self.num_deferred += bool(names)
        for name in names:
            self.books[name].deferred += 1
            assert self.books[name].deferred <= self.longest_wait, "waited too long"

    def _run(self, output: Any) -> ModelRunnerOutput:
        for copied in output.kv_cache_block_copies or ():
            self.memory[copied.dst_block_id] = list(self.memory[copied.src_block_id])
        at = self._take_over(output)
        kind = output.lora_drop.kind.value
        assert kind == self._expected_kind(at, output.num_scheduled_tokens)
        self.kinds += [kind] if at else []
        for name, count in output.num_scheduled_tokens.items():
            books = self.books[name]
            row = output.lora_drop.rows[name]
            assert row.num_tokens == count
            assert row.cache_len == len(books.written[-1]), "the compacted list's length"
            self._write(books, kind, at[name], count)
        names = list(output.num_scheduled_tokens)
        sampled = [self._attend(self.books[name]) for name in names]
        return ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled)

    def _take_over(self, output: Any) -> dict[str, int]:
        """Updates block tables as a runner does; returns each request's first position."""
        at = {}
        for new in output.scheduled_new_reqs:
            at[new.req_id] = new.num_computed_tokens
            self._start(new.req_id, new.num_computed_tokens, new.block_ids)
        cached = output.scheduled_cached_reqs
        for name, position, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids
        ):
            at[name] = position
            if name in cached.resumed_req_ids:
                self.num_preemptions += 1
                self._start(name, position, blocks)
            elif blocks:
                for table, more in zip(self.books[name].table, blocks):
                    table.extend(more)
        return at

    def _start(self, name: str, hit: int, blocks: Any) -> None:
        """(Re)starts a request after a prefix hit; all tokens that it has become its prompt."""
        books = self.books[name]
        books.tokens = list(self.scheduler.requests[name].all_token_ids)
        books.prompt_end, books.phase, books.computed = len(books.tokens), 0, hit
        books.deferred = 0
        del books.chain[:]
        books.identify(hit)
        books.table = [list(table) for table in blocks]
        self.num_cached += hit
        books.written = [list(books.chain) for _ in books.table]

    def _expected_kind(self, at: dict[str, int], counts: dict[str, int]) -> str:
        assert at.keys() == counts.keys()
        prompted = any(at[n] < self.books[n].prompt_end for n in at)
        self.num_prompted += prompted
        due = any(self.books[n].phase >= self.books[n].k for n in at)
        return "full" if prompted or due else "lora"

    def _write(self, books: Books, kind: str, position: int, count: int) -> None:
        assert position == books.computed, "a token was left out or computed twice"
        books.computed = end = position + count
        assert end <= len(books.tokens), "a token nobody sampled"
        books.identify(end)
        skips = self.setup.kv == "skip" and kind == "lora"
        for group, (table, written) in enumerate(zip(books.table, books.written)):
            if group == len(books.table) - 1 and skips:
                continue
            size = self.setup.group_sizes[group]
            for t in range(position, end):
                block, slot = table[len(written) // size], len(written) % size
                self.memory[block][slot] = (books.chain[t], t < books.prompt_end)
                written.append(books.chain[t])
        self.slots[skips] += count
        books.phase = 0 if kind == "full" else books.phase + 1
        assert books.phase <= books.k, "more than k LoRA steps in a row"

    def _attend(self, books: Books) -> list[int]:
        """Reads the request's lists after all writes of the step; samples if a token is due."""
        for group, written in enumerate(books.written):
            size = self.setup.group_sizes[group]
            slots = [slot for block in books.table[group] for slot in self.memory[block][:size]]
            found = slots[: len(written)]
            assert [slot and slot[0] for slot in found] == written, "a slot holds something else"
            if self.setup.kv == "skip":
                prompt = found[: books.prompt_end]
                assert all(clean for _, clean in prompt), "a hit on what no prompt computed"
        if books.computed < len(books.tokens):
            return []
        books.tokens.append(next_token(books.chain[-1]))
        return books.tokens[-1:]

    def finish(self, each: Callable[[], None] = lambda: None) -> None:
        """Runs until every request has ended, and calls `each` after every step."""
        for _ in range(50 + 200 * len(self.books)):
            if not self.busy:
                return
            self.step()
            each()
        raise AssertionError("requests that never end")
