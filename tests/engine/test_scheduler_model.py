"""Scheduler hook and KV manager against a model of them, in random lives of an engine.

`make test` runs 20,000 steps, `make soak` millions; nothing is computed but the books of
`dry_engine.py`. A failure prints the shortest life that hypothesis found to fail.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm")

from dry_engine import EOS, next_token
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kind_ledger import KindLedger
from tqdm import tqdm

pytestmark = pytest.mark.engine

STEPS = 20_000


@st.composite
def setups(draw: st.DrawFn) -> dict[str, Any]:
    unit = draw(st.sampled_from([1, 2, 4]))
    block = st.integers(1, 5).map(lambda n: n * unit)
    return dict(
        kv=draw(st.sampled_from(["skip", "skip", "write"])),
        k=draw(st.integers(1, 5)),
        block_sizes=(draw(block), draw(block)),
        spare_blocks=draw(st.just(0) | st.integers(0, 3) | st.integers(0, 30)),
        max_model_len=draw(st.integers(8, 64)),
        max_num_seqs=draw(st.integers(1, 6) | st.just(16)),
        max_num_batched_tokens=draw(st.integers(16, 64)),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 1, 5])),
        async_scheduling=draw(st.booleans()),
        prefix_caching=draw(st.sampled_from([True, True, False])),
        policy=draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
        prompts=draw(st.sampled_from(["wait", "wait", "now"])),
        drops=draw(st.sampled_from(["drop_layers", "drop_attention"])),
    )


class Life(RuleBasedStateMachine):
    """One engine, from its start to the end of its last request."""

    dry: Any
    seen: Counter[str]
    bar: Any

    @initialize(setup=setups())
    def start(self, setup: dict[str, Any]) -> None:
        self.engine = self.dry(**setup)
        self.kinds = KindLedger(self.engine)
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.aborted: set[str] = set()

    @rule(
        data=st.data(),
        fresh=st.lists(st.integers(3, 4), max_size=12),
        keep=st.sampled_from([64, 64, 20, 5]),
        max_tokens=st.integers(1, 40),
        k=st.none() | st.integers(0, 5),
        twins=st.integers(1, 3),
    )
    def add(
        self, data: Any, fresh: list[int], keep: int, max_tokens: int, k: Any, twins: int
    ) -> None:
        """A prompt of its own, or that of an earlier request with its answer, cut somewhere."""
        setup = self.engine.setup
        prompt = fresh
        if self.asked:
            earlier = data.draw(st.sampled_from([*self.asked, None]))
            if earlier is not None:
                prompt = (self.asked[earlier][0] + self.engine.sent[earlier])[:keep] + fresh
        prompt = prompt[: setup.max_model_len - 1] or [3]
        for n in range(twins):
            name = self.engine.add(prompt, max_tokens, None if k is None else min(k, setup.k), n)
            self.asked[name] = (prompt, max_tokens)

    @rule(prompts=st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=7), max_size=6))
    def join(self, prompts: list[list[int]]) -> None:
        """Short prompts that come one by one, while others decode."""
        for prompt in prompts:
            name = self.engine.add(prompt, 20)
            self.asked[name] = (prompt, 20)
            self.step(len(prompt), False)

    @rule(count=st.integers(1, 25), wait=st.booleans())
    def step(self, count: int, wait: bool) -> None:
        for n in range(count):
            if not self.engine.busy:
                break
            self.engine.step(wait and n == count - 1)
            self.check()

    @precondition(lambda self: self.engine.books)
    @rule(data=st.data(), most=st.integers(1, 3))
    def abort(self, data: Any, most: int) -> None:
        for _ in range(most):
            name = data.draw(st.sampled_from(sorted(self.engine.books)))
            self.engine.abort(name)
            self.aborted.add(name)
        self.check()

    @rule(running=st.booleans())
    def reset_prefix_cache(self, running: bool) -> None:
        self.engine.scheduler.reset_prefix_cache(reset_running_requests=running)
        self.check()

    def check(self) -> None:
        engine = self.engine
        owners: Counter[tuple[int, int]] = Counter()  # (block, group) to requests
        for group, manager in enumerate(engine.managers):
            for name, blocks in manager.req_to_blocks.items():
                ids = [block.block_id for block in blocks]
                assert len(set(ids)) == len(ids), "a block twice in one list"
                owners.update((block, group) for block in ids)
                if name in engine.books:
                    self.check_size(name, group, len(blocks))
        blocks = Counter(block for block, _ in owners)
        assert not [b for b, n in blocks.items() if n > 1], "a block in two groups"
        for block in engine.pool.blocks[1:]:
            count = sum(owners[block.block_id, g] for g in range(len(engine.managers)))
            assert block.ref_cnt == count, "leaked, or owned twice"
            assert count < 2 or block.block_hash is not None, "shared, but not cached"
        used = sum(block.ref_cnt > 0 for block in engine.pool.blocks[1:])
        assert engine.pool.get_num_free_blocks() == len(engine.pool.blocks) - 1 - used
        tracker = engine.scheduler.tracker
        slots = [tracked.slot for tracked in tracker._tracked.values()]
        assert sorted(slots + tracker._free_slots) == list(range(tracker.max_requests))
        assert tracker._tracked.keys() == {r.request_id for r in engine.scheduler.running}

    def check_size(self, name: str, group: int, held: int) -> None:
        """Blocks for what is written and, in the drop group, one slot for a possible full step."""
        if name not in self.engine.scheduler.tracker or not self.engine.books[name].written:
            return
        written = len(self.engine.books[name].written[group])
        size = self.engine.setup.group_sizes[group]
        ahead = group == 1 and self.engine.books[name].phase > 0
        assert -(-written // size) <= held <= -(-(written + ahead) // size)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.finish(self.check)
        assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
        for name, (prompt, max_tokens) in self.asked.items():
            if name not in self.aborted:
                most = min(max_tokens, engine.setup.max_model_len - len(prompt))
                assert engine.sent[name] == answer(prompt, most)
                assert len(self.kinds.told[name]) == len(engine.sent[name])
        totals = engine.scheduler.tracker.totals
        assert [totals.kv_slots_written, totals.kv_slots_skipped] == engine.slots
        assert totals.full_steps + totals.lora_steps == len(engine.kinds)
        assert totals.prompt_steps == engine.num_prompted
        assert not self.aborted or engine.step() is None  # a step in which aborts are forgotten
        assert not len(engine.scheduler.step_kinds), "leaked"
        self.seen.update(
            steps=len(engine.kinds),
            lives=1,
            requests=len(self.asked),
            lora_steps=totals.lora_steps,
            preemptions=engine.num_preemptions,
            cached_tokens=engine.num_cached,
            aborts=len(self.aborted),
            deferred=engine.num_deferred,
        )
        self.bar.update(len(engine.kinds))


def answer(prompt: list[int], most: int) -> list[int]:
    """What the dry runner samples, alone and undisturbed."""
    chain, tokens = 0, []
    for token in prompt:
        chain = hash((chain, token))
    while len(tokens) < most and tokens[-1:] != [EOS]:
        tokens.append(next_token(chain))
        chain = hash((chain, tokens[-1]))
    return tokens


def test_random_lives_keep_the_rules(
    dry: Any, effort: int, first_seed: int, capsys: Any, record_property: Any
) -> None:
    seen: Counter[str] = Counter()
    rules = settings(
        max_examples=100,
        stateful_step_count=40,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    number = first_seed
    with capsys.disabled(), tqdm(total=STEPS * effort, unit="step", disable=effort == 1) as bar:
        while seen["steps"] < STEPS * effort:
            given = dict(dry=staticmethod(dry), seen=seen, bar=bar)
            run_state_machine_as_test(seed(number)(type("Life", (Life,), given)), settings=rules)
            number += 1
        bar.close()
        print(f"\n{dict(seen)}, seeds {first_seed} to {number - 1}")
    for what in ("lora_steps", "preemptions", "cached_tokens", "aborts", "deferred"):
        assert seen[what] > STEPS // 200, f"hardly any {what}: little was tested"
    for what, count in seen.items():
        record_property(what, count)
