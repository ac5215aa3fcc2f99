"""The model `lora_drop` for lm-eval: its Hugging Face model under the served schedule.

Importing this module registers the model; `lora-drop lm-eval` imports it and then runs lm-eval's
own command. The context, in lm-eval's words, is the prompt; what follows runs in cycles of k LoRA
steps and a full step. Tokens, truncation and stop strings are those of lm-eval's model `hf`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.positions import Schedule, rows, take
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.scoring import Candidate, score
from lora_drop_vllm.hub import adapter_folder
from lora_drop_vllm.method.adapter import load_tensors, read_config

OTHER_MODELS = ("autogptq", "delta", "gguf_file", "gptqmodel", "parallelize", "peft", "tp_plan")
IDLE = {"do_sample", "temperature", "top_k", "top_p"}  # no effect while do_sample is false


def run(arguments: Sequence[str]) -> None:
    """Runs lm-eval's own command, which reads its arguments from `sys.argv`."""
    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()


@register_model("lora_drop")
class LoRADropLM(HFLM):  # type: ignore[misc]
    """A Hugging Face model with an adapter, for lm-eval.

    Args:
        pretrained: model folder, or a name in the local Hugging Face cache
        adapter: the adapter's folder, or its name on the Hugging Face Hub
        k: LoRA steps between two full steps, instead of the adapter's k; 0 is the base model
        options: those of lm-eval's model `hf`

    Raises:
        ValueError: settings or files that cannot be used.
    """

    def __init__(
        self, pretrained: str, adapter: str | None = None, k: int | None = None, **options: Any
    ) -> None:
        def refuse(name: str, value: object, instead: str) -> ValueError:
            return ValueError(f"--model_args {name}={value}: {instead}")

        if adapter is None:
            raise refuse("adapter", adapter, "expected the folder of an adapter")
        if k is not None and (type(k) is not int or k < 0):
            raise refuse("k", k, "expected 0 or more LoRA steps between two full steps")
        for name in OTHER_MODELS:
            if options.get(name):
                raise refuse(name, options[name], "not supported with LoRA-Drop; leave it out")
        folder = adapter_folder(adapter)
        config = read_config(folder)
        config = config if k is None else replace(config, k=k)
        tensors = load_tensors(folder, config)
        try:
            super().__init__(pretrained, backend="causal", **options)
        except OSError as error:
            raise refuse(
                "pretrained", pretrained, "no such model folder, nor one in the local cache"
            ) from error
        self._decoder = ForcedDecoder(self.model, Adapter(config, tensors).to(self.device))

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model for lm-eval's results."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"lora_drop": asdict(self._decoder.adapter.config)}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation; whether greedy decoding would produce it."""
        candidates = []
        for words, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens ({words}): expected 1 to "
                    f"{self.max_length}, the model's number of positions; leave its task out"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            candidates.append(Candidate(tokens, len(tokens) - len(continuation)))
        k = self._decoder.adapter.config.k
        scores = score(self._decoder, candidates, k, "Continuations", base=False)
        return [(float(row[0]), bool(row[1])) for row in scores]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Greedy decoding; after a stop string there is only padding.

        Args:
            context: [N, T]  prompts, padded on the left
            options: `attention_mask` [N, T], and the options of the task

        Returns:
            [N, S], S <= max_length: prompts and continuations.

        Raises:
            ValueError: the task wants more than greedy decoding.
        """
        prompts = [row[real.bool()] for row, real in zip(context, options.pop("attention_mask"))]
        idle = set() if options.get("do_sample") else IDLE
        if asked := {name: value for name, value in options.items() if name not in idle}:
            raise ValueError(
                f"generation_kwargs {asked}: only greedy decoding works here; serve the model "
                "with vLLM and evaluate it with --model local-completions"
            )
        said = context.new_zeros(len(prompts), 0)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=context.device)
        while context.shape[1] + said.shape[1] < max_length and not ended.all():
            token = next_tokens(self._decoder, prompts, said)
            token = token.where(~ended, self.tokenizer.pad_token_id)
            said = torch.cat((said, token[:, None]), 1)
            texts = self.tokenizer.batch_decode(said)
            ended = ended.new_tensor([any(end in text for end in stop) for text in texts])
        return torch.cat((context, said), 1)


@torch.no_grad()
def next_tokens(decoder: ForcedDecoder, prompts: Sequence[Tensor], said: Tensor) -> Tensor:
    """Best next token [N] after N prompts and the S tokens [N, S] decoded so far.

    Everything runs again for each token, which is slow; serving is the fast way.
    """
    tokens = pad_sequence([torch.cat(pair) for pair in zip(prompts, said)], batch_first=True)
    prompt = torch.tensor([len(p) for p in prompts], device=said.device)
    sequence = rows((prompt + said.shape[1]).tolist()).to(said.device)
    schedule = Schedule.of(sequence, prompt, decoder.adapter.config.k)
    last = torch.arange(len(prompts), device=said.device) * tokens.shape[1]
    hidden = take(decoder.hidden(tokens, schedule), last + prompt + said.shape[1] - 1)
    return decoder.logits(hidden).argmax(-1)
