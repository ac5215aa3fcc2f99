"""The installed vLLM still has every name that engine/ relies on, and is the pinned one."""

from __future__ import annotations

from importlib import metadata

import pytest

pytestmark = pytest.mark.engine


def test_every_seam_is_there() -> None:
    from lora_drop_vllm.engine.seams import check_seams

    check_seams()


def test_a_lost_seam_stops_with_the_file_to_port() -> None:
    from lora_drop_vllm.engine.seams import Seam, check_seams

    with pytest.raises(RuntimeError, match=r"engine/scheduler.py relies on it"):
        check_seams([Seam("vllm.v1.core.sched.scheduler:NoSuchClass", "scheduler.py")])
    lost = Seam("vllm.v1.core.sched.scheduler:Scheduler.make_stats", "scheduler.py", ("gone",))
    with pytest.raises(RuntimeError, match=r"lost \['gone'\]"):
        check_seams([lost])


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_drop_vllm.engine import plugin

    plugin.check_vllm_version()
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.33.0" if name == "vllm" else version(name)
    )
    with pytest.raises(RuntimeError, match=r"works with vllm==0.32.*vllm 0.33.0 is installed"):
        plugin.check_vllm_version()


def test_registering_twice_is_harmless() -> None:
    from vllm.config import VllmConfig

    from lora_drop_vllm.engine.plugin import register

    register()
    patched = VllmConfig.try_verify_and_update_config
    register()
    assert VllmConfig.try_verify_and_update_config is patched
