r"""A quantized copy of a model, in the format of compressed-tensors, by GPTQ of llm-compressor.

`int8` is W8A8: one scale per output channel of a weight, one per token of what it reads. `int4` is
W4A16: the weights alone, one scale per group of 64 input channels. llm-compressor needs other
versions of what this project pins, so it gets a virtual environment of its own:

    python3 -m venv quantize
    quantize/bin/pip install llmcompressor==0.14.0.1
    quantize/bin/python benchmarks/quantize_model.py MODEL OUT --kind int8 --text web.jsonl.gz

It imports nothing of this project.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

KINDS = ("int8", "int4")
GROUP = 64  # divides the 576 and 1536 inputs of the 135M model's layers; presets have 128
SAMPLES, LENGTH = 32, 512


def scheme(kind: str) -> dict[str, Any]:
    """Arguments of `GPTQModifier` that say what is rounded how."""
    if kind == "int8":
        return {"targets": ["Linear"], "scheme": "W8A8"}
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": GROUP}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def main() -> None:
    """Calibrates, quantizes and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder, or a name on the Hugging Face Hub")
    parser.add_argument("out", type=Path, help="folder of the quantized copy")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument(
        "--text", type=Path, required=True, help='JSON lines with a "text", to calibrate on'
    )
    given = parser.parse_args()

    from datasets import load_dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = load_dataset("json", data_files=str(given.text), split="train").shuffle(seed=0)
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(given.model),
        dataset=texts.select(range(min(SAMPLES, len(texts)))),
        num_calibration_samples=SAMPLES,
        max_seq_length=LENGTH,
        recipe=GPTQModifier(ignore=["lm_head"], **scheme(given.kind)),
        output_dir=str(given.out),
    )


if __name__ == "__main__":
    main()
