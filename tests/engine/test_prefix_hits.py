"""Which blocks a request may take over from another one, on engines that keep books only.

The books themselves check every slot that a request reads (`dry_engine.py`).
"""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.engine

PROMPT = [3, 4, 4, 3, 4, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_equal_prompts_that_arrive_together(dry: Any, async_scheduling: bool) -> None:
    """The copy of a block runs before the step in which the first of them writes it."""
    engine = dry(async_scheduling=async_scheduling)
    for _ in range(3):
        engine.add(PROMPT, 6)
    engine.finish()
    assert engine.num_cached == 2 * 9  # the last token of a prompt is always computed


def test_the_turns_of_a_conversation_share_prompts_only(dry: Any) -> None:
    """Answers become prompts; blocks that LoRA steps wrote may not stand in for them."""
    engine = dry()
    first = engine.add(PROMPT, 9)
    engine.finish()
    assert engine.num_cached == 0
    said = PROMPT + engine.sent[first]
    for turn, cached in enumerate((9, 9 + len(said), 9 + 2 * len(said))):
        engine.add([*said, 3 + turn], 2)
        engine.finish()
        assert engine.num_cached == cached


def test_a_pool_for_one_request_has_no_room_for_a_copy(dry: Any) -> None:
    engine = dry(spare_blocks=0, max_model_len=12)
    for _ in range(2):
        engine.add(PROMPT, 2)
        engine.finish()
    assert engine.num_cached == 0
