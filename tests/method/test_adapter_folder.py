"""Adapters and settings from strangers raise only our own errors; nothing else is read.

`make test` tries thousands of inputs, `make fuzz` 100,000.
"""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tqdm import tqdm

from lora_drop_vllm.config import LoRADropConfigError, resolve
from lora_drop_vllm.method.adapter import (
    CONFIG_FILE,
    TENSOR_FILE,
    AdapterConfig,
    AdapterError,
    BaseModel,
    save_adapter,
)

INPUTS = 500  # of each of the four kinds
MODEL = BaseModel("llama", 8, 16)
CONFIG = AdapterConfig("base", MODEL, 2, 4.0, 0.5, 3, [3, 5], "update", "skip", "block")
TENSORS = {name: torch.ones(shape) for name, shape in CONFIG.sites.shapes().items()}
TENSOR_BYTES = save(TENSORS)

STRANGE = st.sampled_from(
    [
        *(None, True, "", "\ud800", "a\0b", "x" * 5000, [], {}, [[]], {"a": {"b": 1}}, ["3"]),
        *(-1, 0, 2**63, 10**4000, 1e308, float("nan"), float("inf"), -0.0, 0.5),
        *([3, 5], [3, 3], [10**30]),
    ]
)
JSON_TEXTS = st.sampled_from(
    [
        ('"r": 2', '"r": 2, "r": 2'),
        ('"r": 2', f'"r": {"9" * 5000}'),
        ('"skip"', "[" * 100_000),
        ('"base"', '"\\ud800"'),
        *(("4.0", "1e999"), ("4.0", "NaN"), ("3", "3_0")),
    ]
)
VALUES = STRANGE | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with bytes flipped, removed, repeated or inserted."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)) | st.integers(0, 200))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if kind == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        else:
            data += data[at:]
    return bytes(data)


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """A valid config with changed keys, some of them also damaged as text."""
    raw: dict[str, Any] = json.loads(json.dumps(CONFIG, default=vars))
    for _ in range(draw(st.integers(0, 3))):
        inside = draw(st.booleans()) and isinstance(raw.get("base_model"), dict)
        target = raw["base_model"] if inside else raw
        key = draw(st.sampled_from([*target, "colour"]) | st.text(max_size=4))
        if draw(st.booleans()):
            target[key] = draw(VALUES)
        else:
            target.pop(key, None)
    text = json.dumps(raw)
    for old, new in draw(st.lists(JSON_TEXTS, max_size=2)):
        text = text.replace(old, new, 1)
    data = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig"])))
    return data if draw(st.booleans()) else draw(damaged(data))


@st.composite
def tensor_files(draw: st.DrawFn) -> bytes:
    """A valid file with changed header entries, NaN in its data, or another length."""
    if draw(st.booleans()):
        return draw(damaged(TENSOR_BYTES))
    (length,) = struct.unpack("<Q", TENSOR_BYTES[:8])
    header = json.loads(TENSOR_BYTES[8 : 8 + length])
    data = bytearray(TENSOR_BYTES[8 + length :])
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)))
        kind = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "drop", "nan"]))
        sizes = st.lists(st.sampled_from([0, 1, 2, 16, 32, 2**31, 2**63, -1]), max_size=4)
        if kind == "dtype":
            kinds = ["F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "U64", "F4", "", "X"]
            header[name]["dtype"] = draw(st.sampled_from(kinds))
        elif kind in ("shape", "data_offsets"):
            header[name][kind] = draw(sizes | VALUES)
        elif kind == "name":
            header[draw(st.text(max_size=4) | st.just("__metadata__"))] = header.pop(name)
        elif kind == "drop" and len(header) > 1:
            del header[name]
        else:
            data[0:4] = draw(st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\xff"]))
    text = json.dumps(header).encode()
    stated = draw(st.sampled_from([len(text)] * 4 + [0, len(text) + 1, 2**40, 2**64 - 1]))
    return struct.pack("<Q", stated) + text + bytes(data)


KEYS = ["adapter", "untrained", "k", "rho", "layers", "drop_layers", "reuse", "kv", "injection"]
KEYS += ["drop_attention"]
SETTINGS = VALUES | st.dictionaries(
    st.sampled_from([*KEYS, "r", "request_k", "prompts"]) | st.text(max_size=3) | st.integers(),
    VALUES | st.sampled_from(["uniform", "none", "write", "attn_mlp", 3, [4, 6], {"min": 1}]),
    max_size=5,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", CONFIG, TENSORS)
    return tmp_path / "adapter"


def accepts(given_settings: Any) -> bool:
    """True if the settings are accepted; errors other than ours are raised."""
    try:
        resolve(given_settings, MODEL)
    except (AdapterError, LoRADropConfigError):
        return False
    return True


def test_only_our_errors_come_out(
    folder: Path,
    effort: int,
    first_seed: int,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, int], None],
) -> None:
    taken = {True: 0, False: 0}

    def write(name: str, data: bytes) -> bool:
        (folder / name).write_bytes(data)
        return accepts({"adapter": str(folder)})

    def trial(door: Callable[[Any], bool], value: Any) -> None:
        taken[door(value)] += 1
        bar.update()

    adapter = {"adapter": str(folder)}
    kinds: list[tuple[Any, Callable[[Any], bool]]] = [
        (SETTINGS, accepts),
        (SETTINGS.filter(lambda s: isinstance(s, dict)), lambda s: accepts(s | adapter)),
        (configs(), lambda data: write(CONFIG_FILE, data)),
        (tensor_files(), lambda data: write(TENSOR_FILE, data)),
    ]
    rules = settings(
        max_examples=INPUTS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    total = len(kinds) * INPUTS * effort
    with capsys.disabled(), tqdm(total=total, unit="input", disable=effort == 1) as bar:
        for number in range(first_seed, first_seed + effort):
            for strategy, door in kinds:
                save_adapter(folder, CONFIG, TENSORS)
                rules(seed(number)(given(st.just(door), strategy)(trial)))()
        bar.close()
        print(f"\n{sum(taken.values())} inputs, {taken[True]} of them valid")
    assert sum(taken.values()) >= 0.95 * total
    assert taken[True] > 0.01 * total and taken[False] > 0.5 * total
    record_property("inputs", sum(taken.values()))
    record_property("valid_inputs", taken[True])


@pytest.mark.parametrize("value", [10**5000, [10**5000], -(10**5000)], ids=["k", "list", "minus"])
def test_numbers_that_python_does_not_print(value: Any) -> None:
    for key in ("k", "rho", "r", "drop_layers", "kv", "adapter", "colour"):
        assert not accepts({"untrained": True, key: value})


@pytest.mark.parametrize("sizes", [(10**9, 16), (10**18, 16), (8, 10**15)], ids=str)
def test_huge_models_are_refused_before_anything_is_made(
    folder: Path, sizes: tuple[int, int]
) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_text())
    raw["base_model"] |= dict(zip(("num_hidden_layers", "hidden_size"), sizes))
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    tracemalloc.start()
    assert not accepts({"adapter": str(folder)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(AdapterError, match=f"{name} is a link out of the folder, to /"):
        resolve({"adapter": str(folder)}, MODEL)
    (folder / name).unlink()
    (folder / "inside").write_bytes((tmp_path / name).read_bytes())
    (folder / name).symlink_to("inside")
    assert accepts({"adapter": str(folder)})
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(AdapterError, match="cannot be read"):
        resolve({"adapter": str(folder)}, MODEL)


def test_the_links_of_a_hugging_face_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for name in (CONFIG_FILE, TENSOR_FILE):
        (folder / name).rename(snapshot.parents[1] / "blobs" / name[8:])
        (snapshot / name).symlink_to(f"../../blobs/{name[8:]}")
    assert accepts({"adapter": str(snapshot)})
    os.symlink(snapshot, tmp_path / "link")
    assert accepts({"adapter": str(tmp_path / "link")})
