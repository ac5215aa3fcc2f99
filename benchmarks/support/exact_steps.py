"""What `kv: skip` costs if LoRA steps were exact.

A refresh runs the base model's own layers. In a drop layer it sees no key or value of a LoRA step,
and no correction brings these back.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lora_drop_vllm.decode.batch import Batch
from lora_drop_vllm.decode.decoder import ForcedDecoder, run_layer
from lora_drop_vllm.decode.positions import Schedule
from lora_drop_vllm.decode.pretrained import open_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.divergence import Divergence, on_sequences
from lora_drop_vllm.method.adapter import load_tensors, read_config
from lora_drop_vllm.training.chat import Reply
from lora_drop_vllm.training.corpus import read_corpus


class ExactLoraSteps(ForcedDecoder):
    """The base model with the holes that `kv: skip` leaves; of the adapter only the layers count.

    LoRA positions run every layer and see all keys. Full positions do not see, in the drop layers,
    the keys of LoRA positions.
    """

    def hidden_and_base(self, tokens: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """The normed stream with the holes, and the base model's, [N, T, d] each."""
        x, batch = self._stem(tokens, schedule)
        base = self._rest(x, batch)
        holes = replace(batch, mask=_with_holes(schedule))
        for i in range(self._shared, self.model.config.num_hidden_layers):
            x = run_layer(self.model.model.layers[i], x, self._batch_of(i, batch, holes))
        return self.model.model.norm(x), base

    def _batch_of(self, i: int, batch: Batch, holes: Batch) -> Batch:
        return holes if i in self.adapter.config.sites.parts else batch


def _with_holes(schedule: Schedule) -> Tensor:
    """Mask [N, 1, T, T] of the keys that each query of a drop layer sees; padding sees itself."""
    T = schedule.full.shape[1]
    of = schedule.sequence
    causal = of.new_ones(T, T).tril().bool()
    own = (of[:, :, None] == of[:, None, :]) & causal
    hole = schedule.full[:, :, None] & schedule.lora[:, None, :]
    return (own & ~hole)[:, None]


def on_chat(model: str | Path, adapter: Path, file: Path) -> dict[str, Divergence]:
    """Divergence of `ExactLoraSteps` on chat replies, each after its own prompt, by kind of step.

    Args:
        file: JSON lines of conversations

    Returns:
        Nothing for an adapter with `kv: write`, which leaves no holes.
    """
    config = read_config(adapter)
    if config.kv != "skip":
        return {}
    opened, tokenizer = open_model(model)
    decoder = ExactLoraSteps(opened, Adapter(config, load_tensors(adapter, config)))
    documents = read_corpus([file]).rendered(tokenizer, opened.config.max_position_embeddings)
    replies = [(r.tokens, r.prompt) for r in documents.documents if isinstance(r, Reply)]
    return on_sequences(decoder, replies, config.k)
