"""The installed vLLM still has every name that engine/ relies on, and is the pinned one."""

from __future__ import annotations

from importlib import metadata

import pytest

pytestmark = pytest.mark.engine


def test_every_seam_is_there() -> None:
    from lora_drop_vllm.engine.seams import check_seams

    check_seams()


def test_a_lost_seam_stops_with_the_file_to_port() -> None:
    from lora_drop_vllm.engine.seams import SEAMS, Seam, check_seams, lost

    with pytest.raises(RuntimeError, match=r"engine/scheduler.py relies on it"):
        check_seams([Seam("vllm.v1.core.sched.scheduler:NoSuchClass", "scheduler.py")])
    target = "vllm.v1.core.sched.scheduler:Scheduler.make_stats"
    lost_parameter = Seam(target, "scheduler.py", ("gone",))
    with pytest.raises(RuntimeError, match=r"lost \['gone'\]"):
        check_seams([lost_parameter])
    assert lost([*SEAMS, lost_parameter]) == [
        f"{target} lost ['gone']; engine/scheduler.py relies on them. Port that file, then widen "
        "the vLLM pin in pyproject.toml."
    ]


def test_lost_switches_of_partial_prefix_hits_stop_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    from lora_drop_vllm.engine.kv_cache import allow_partial_prefix_hits

    manager = object.__new__(FullAttentionManager)
    coordinator = object.__new__(HybridKVCacheCoordinator)
    coordinator.single_type_managers, coordinator.hash_block_size = (manager,), 16
    with pytest.raises(
        RuntimeError,
        match=r"FullAttentionManager lost \['cache_hit_alignment_tokens'\]; engine/kv_c",
    ):
        allow_partial_prefix_hits(coordinator)
    manager.cache_hit_alignment_tokens = 48
    allow_partial_prefix_hits(coordinator)
    assert coordinator.enable_partial_hash_hits and manager.cache_hit_alignment_tokens == 16
    del coordinator.enable_partial_hash_hits
    monkeypatch.delattr(KVCacheCoordinator, "enable_partial_hash_hits")
    with pytest.raises(RuntimeError, match=r"Coordinator lost \['enable_partial_hash_hits'\]; eng"):
        allow_partial_prefix_hits(coordinator)


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_drop_vllm.engine import plugin

    plugin.check_vllm_version()
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "9.9.9" if name == "vllm" else version(name)
    )
    with pytest.raises(RuntimeError, match=r"works with vllm==.*vllm 9\.9\.9 is installed"):
        plugin.check_vllm_version()


def test_registering_twice_is_harmless() -> None:
    from vllm.config import VllmConfig

    from lora_drop_vllm.engine.plugin import register

    register()
    patched = VllmConfig.try_verify_and_update_config
    register()
    assert VllmConfig.try_verify_and_update_config is patched
