"""vLLM's real scheduler and block pool under our hook, with books in the place of a model.

The runner of these engines computes nothing: it writes down, slot by slot, what a model would have
written into each KV block, and holds every plan to a second statement of the rules.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from lora_drop_vllm.engine.kv_cache import AlwaysOnSpec, DropLayerSpec
from lora_drop_vllm.engine.scheduler import LoRADropScheduler

EOS = 2


@dataclass(frozen=True)
class Setup:
    """One engine: the settings of LoRA-Drop, the pool, and vLLM's scheduler."""

    kv: str
    k: int
    block_sizes: tuple[int, int]  # tokens per block of the always-on and of the drop layers
    spare_blocks: int  # beyond what one request of max_model_len takes
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int
    async_scheduling: bool
    prefix_caching: bool
    policy: str

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return self.block_sizes if self.kv == "skip" else self.block_sizes[:1]

    @property
    def num_blocks(self) -> int:
        longest = sum(-(-self.max_model_len // size) for size in self.group_sizes)
        return 1 + longest + self.spare_blocks  # the first is vLLM's null block


def prepare(model: Path) -> Any:
    """vLLM's config of a model served with LoRA-Drop, and what an engine core does but once."""
    config = EngineArgs(
        str(model),
        model_impl="lora_drop",
        additional_config={"lora_drop": {"untrained": True}},
        skip_tokenizer_init=True,
        enforce_eager=True,
    ).create_engine_config()
    register_all_kvcache_specs(config)
    init_none_hash(sha256)
    return config


def make_scheduler(vllm_config: Any, setup: Setup) -> tuple[Any, Any]:
    """The scheduler an engine core would build, and its hasher of token blocks."""
    config = copy.copy(vllm_config)
    config.model_config = copy.copy(config.model_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.cache_config = copy.copy(config.cache_config)
    config.model_config.max_model_len = setup.max_model_len
    for name in ("max_num_seqs", "max_num_batched_tokens", "async_scheduling", "policy"):
        setattr(config.scheduler_config, name, getattr(setup, name))
    config.scheduler_config.long_prefill_token_threshold = setup.long_prefill_token_threshold
    config.cache_config.enable_prefix_caching = setup.prefix_caching
    config.cache_config.num_gpu_blocks = setup.num_blocks
    config.cache_config.block_size = setup.block_sizes[0]
    settings = config.additional_config["lora_drop"] | {"k": setup.k, "kv": setup.kv}
    config.additional_config = {"lora_drop": settings}
    kinds = (AlwaysOnSpec, DropLayerSpec) if setup.kv == "skip" else (FullAttentionSpec,)
    plain: dict[str, Any] = dict(num_kv_heads=1, head_size=8, dtype=torch.float32)
    groups = [
        KVCacheGroupSpec([kind.__name__], kind(block_size=size, **plain))
        for kind, size in zip(kinds, setup.group_sizes)
    ]
    kv_cache_config = KVCacheConfig(setup.num_blocks, [], groups)
    block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, config)
    scheduler = LoRADropScheduler(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=SimpleNamespace(accept_tokens=lambda request, tokens: True),
        block_size=block_size,
        hash_block_size=hash_block_size,
        log_stats=False,
    )
    return scheduler, get_request_block_hasher(hash_block_size, sha256)


@dataclass
class Books:
    """What the runner knows of one request.

    Attributes:
        tokens: prompt and all that was sampled
        chain: identity of the tokens up to each position
        prompt_end: positions below it are computed as a prompt
        written: per KV group, the identities of the tokens in the request's list
    """

    tokens: list[int]
    k: int
    chain: list[int] = field(default_factory=list)
    prompt_end: int = 0
    computed: int = 0
    phase: int = 0
    written: list[list[int]] = field(default_factory=list)
    table: list[list[int]] = field(default_factory=list)

    def identify(self, end: int) -> None:
        """Extend `chain` to positions below `end`."""
        for t in range(len(self.chain), end):
            before = self.chain[-1] if self.chain else 0
            self.chain.append(hash((before, self.tokens[t])))


def next_token(chain: int) -> int:
    """Sampled after the tokens that `chain` stands for: few tokens, now and then the end."""
    return EOS if chain % 61 == 0 else 3 + chain % 3


class DryEngine:
    """An engine core whose steps keep books.

    Attributes:
        sent: what each request's client got so far
        num_steps, num_preemptions, num_cached: seen so far
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
        self.num_steps = self.num_preemptions = self.num_cached = 0
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
        """Schedule and run a step; its output comes at once, or async when the next one runs.

        `wait` makes an asynchronous engine's output come at once, too.
        """
        output = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            self.num_steps += 1
        self.in_flight.append((output, self._run(output)))
        ahead = self.setup.async_scheduling and output.total_num_scheduled_tokens and not wait
        while len(self.in_flight) > bool(ahead):
            outputs = self.scheduler.update_from_output(*self.in_flight.popleft())
            for result in outputs[0].outputs if outputs else ():
                self.sent[result.request_id] += result.new_token_ids
        for name in self.books.keys() - self.scheduler.requests.keys():
            del self.books[name]

    def _run(self, output: Any) -> ModelRunnerOutput:
        for copied in output.kv_cache_block_copies or ():
            self.memory[copied.dst_block_id] = list(self.memory[copied.src_block_id])
        at = self._take_over(output)
        kind = output.lora_drop.kind.value
        assert kind == self._expected_kind(at, output.num_scheduled_tokens)
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
        """Block tables as a runner would keep them; returns each request's first position."""
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
        """(Re)start a request behind a prefix hit: from here on all it has is a prompt."""
        books = self.books[name]
        books.tokens = list(self.scheduler.requests[name].all_token_ids)
        books.prompt_end, books.phase, books.computed = len(books.tokens), 0, hit
        del books.chain[:]
        books.identify(hit)
        books.table = [list(table) for table in blocks]
        self.num_cached += hit
        books.written = [list(books.chain) for _ in books.table]

    def _expected_kind(self, at: dict[str, int], counts: dict[str, int]) -> str:
        due = [
            at[n] < self.books[n].prompt_end or self.books[n].phase >= self.books[n].k for n in at
        ]
        assert at.keys() == counts.keys()
        return "full" if any(due) else "lora"

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
        """Read the request's lists, all writes of the step done, and sample if there is a next."""
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
        """Run until every request has ended, and `each` after every step."""
        for _ in range(50 + 200 * len(self.books)):
            if not self.busy:
                return
            self.step()
            each()
        raise AssertionError("requests that never end")
