"""An independent implementation of the method: plain PyTorch on the Hugging Face model.

It runs token by token and request by request, without vLLM and without this package's own maths.
The tests compare the served engine with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Settings:
    drop_layers: list[int]
    k: int
    reuse: str
    kv: str
    injection: str
    scale: float = 1.0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    drop_attention: list[int] = field(default_factory=list)


class Oracle:
    """One request under LoRA-Drop.

    Attributes:
        tokens: all tokens so far, prompt first
        logprobs: log-probability of each generated token
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.config = model.config
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.margins: list[float] = []  # between the best token and the next
        self._forget()

    def _forget(self) -> None:
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        self.state: dict[tuple[int, str], Tensor] = {}
        self.phase = 0

    @torch.no_grad()
    def prompt(self, tokens: list[int]) -> None:
        """Computes all tokens as a prompt (also after a preemption) and samples one."""
        self._forget()
        self.tokens = list(tokens)
        self._sample(self._full(range(len(tokens))))

    @torch.no_grad()
    def step(self, kind: str) -> None:
        """Runs the last sampled token through a step of the given kind and samples the next."""
        t = len(self.tokens) - 1
        self._sample(self._full([t]) if kind == "full" else self._lora(t))
        self.phase = 0 if kind == "full" else self.phase + 1

    def decode(self, prompt: list[int], count: int) -> list[int]:
        """Decodes a lone request: the prompt, k LoRA steps, a refresh, and so on."""
        self.prompt(prompt)
        while len(self.tokens) < len(prompt) + count:
            self.step("full" if self.phase >= self.settings.k else "lora")
        return self.tokens[len(prompt) :]

    def _sample(self, x: Tensor) -> None:
        logits = self.model.lm_head(self.model.model.norm(x)).float()
        self.logits = logits
        best = logits.topk(2).values
        token = int(logits.argmax())
        self.tokens.append(token)
        self.margins.append(float(best[0] - best[1]))
        self.logprobs.append(float(logits.log_softmax(-1)[token]))

    def _full(self, positions: Any) -> Tensor:
        positions = list(positions)
        x = self.model.model.embed_tokens(torch.tensor([self.tokens[t] for t in positions]))
        for i, layer in enumerate(self.model.model.layers):
            before = x
            h = x + self._attention(i, layer, layer.input_layernorm(x), positions)
            x = h + layer.mlp(layer.post_attention_layernorm(h))
            if self._how(i) is not None:
                self._keep(i, before[-1], h[-1], x[-1])
        return x[-1]

    def _lora(self, t: int) -> Tensor:
        s = self.settings
        x = self.model.model.embed_tokens(torch.tensor([self.tokens[t]]))
        for i, layer in enumerate(self.model.model.layers):
            how = self._how(i)
            if how is None:
                h = x + self._attention(i, layer, layer.input_layernorm(x), [t])
                x = h + layer.mlp(layer.post_attention_layernorm(h))
                continue
            if s.kv == "write":
                self._append(i, layer, layer.input_layernorm(x), [t])
            if how == "attn":
                h = self._update(i, "attn", x[0])[None]
                x = h + layer.mlp(layer.post_attention_layernorm(h))
                continue
            for site in ("",) if how == "block" else ("attn", "mlp"):
                x = self._update(i, site, x[0])[None]
        return x[0]

    def _how(self, i: int) -> str | None:
        """What drops of a layer; None: nothing."""
        s = self.settings
        if i in s.drop_attention:
            return "attn"
        return s.injection if i in s.drop_layers else None

    def _update(self, i: int, site: str, x: Tensor) -> Tensor:
        s = self.settings
        name = f"layers.{i}.{site}" if site else f"layers.{i}"
        a = s.tensors[f"{name}.lora_A.weight"].to(x.dtype).float()
        b = s.tensors[f"{name}.lora_B.weight"].to(x.dtype).float()
        out = s.scale * (b @ (a @ x.float()))
        if s.reuse in ("update", "none"):
            out = out + x.float()
        if s.reuse != "none":
            out = out + self.state[i, site].float()
        out = out.to(x.dtype)
        if s.reuse == "previous":
            self.state[i, site] = out
        return out

    def _keep(self, i: int, before: Tensor, middle: Tensor, after: Tensor) -> None:
        s = self.settings
        ends = {"": (before, after)}
        if self._how(i) == "attn_mlp":
            ends = {"attn": (before, middle), "mlp": (middle, after)}
        if self._how(i) == "attn":
            ends = {"attn": (before, middle)}
        for site, (a, b) in ends.items():
            if s.reuse == "update":
                name = f"layers.{i}.{site}.gate" if site else f"layers.{i}.gate"
                gate = s.tensors[name].to(b.dtype).float()
                self.state[i, site] = (gate * (b.float() - a.float())).to(b.dtype)
            else:
                self.state[i, site] = b

    def _append(self, i: int, layer: Any, normed: Tensor, positions: list[int]) -> None:
        attn, hd = layer.self_attn, self._head_dim()
        k = attn.k_proj(normed).view(len(positions), -1, hd)
        v = attn.v_proj(normed).view(len(positions), -1, hd)
        if hasattr(attn, "k_norm"):
            k = attn.k_norm(k)
        cos, sin = self._rope(k, positions)
        self.keys.setdefault(i, []).extend(_rotate(k, cos, sin))
        self.values.setdefault(i, []).extend(v)

    def _attention(self, i: int, layer: Any, normed: Tensor, positions: list[int]) -> Tensor:
        attn, hd = layer.self_attn, self._head_dim()
        seen = len(self.keys.get(i, ()))
        self._append(i, layer, normed, positions)
        q = attn.q_proj(normed).view(len(positions), -1, hd)
        if hasattr(attn, "q_norm"):
            q = attn.q_norm(q)
        cos, sin = self._rope(q, positions)
        q = _rotate(q, cos, sin).float() * self._query_scale(positions)
        keys = torch.stack(self.keys[i]).float()
        values = torch.stack(self.values[i]).float()
        groups = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, keys) * hd**-0.5
        place = torch.arange(keys.shape[0])
        causal = place[None, :] <= seen + torch.arange(len(positions))[:, None]
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, values).to(normed.dtype)
        return attn.o_proj(out.reshape(len(positions), -1))

    def _head_dim(self) -> int:
        c = self.config
        return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads

    def _query_scale(self, positions: list[int]) -> Any:
        """Ministral 3's factor of the queries, [T, 1, 1]; 1 for the other families."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if "llama_4_scaling_beta" not in rope:
            return 1.0
        times = torch.tensor(positions) // rope["original_max_position_embeddings"]
        return (1 + rope["llama_4_scaling_beta"] * torch.log(1.0 + times))[:, None, None]

    def _rope(self, like: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
        cos, sin = self.model.model.rotary_emb(like[None], torch.tensor([positions]))
        return cos[0][:, None], sin[0][:, None]


class Forced(Oracle):
    """The oracle on given tokens, with gradients if the settings' tensors require them."""

    def logits_of(self, tokens: list[int], full: list[bool]) -> Tensor:
        """Logits [T, vocabulary]; `full` is true for each token of a full step."""
        self._forget()
        self.tokens = tokens
        x = torch.stack([self._full([t]) if full[t] else self._lora(t) for t in range(len(tokens))])
        return self.model.lm_head(self.model.model.norm(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin
