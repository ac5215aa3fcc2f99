"""An adapter as a module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora_drop_vllm.method.adapter import AdapterConfig, check_tensors


class Adapter(nn.Module):
    """The tensors of an adapter folder as trainable parameters in fp32.

    Raises:
        AdapterError: the tensors do not match the config.
    """

    def __init__(self, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        check_tensors("adapter", config, tensors)
        self.config = config
        self._parameters_by_name = nn.ParameterDict(
            {
                name.replace(".", "/"): value.detach().float().clone()
                for name, value in tensors.items()
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        """The parameters themselves, by their names in an adapter folder."""
        return {name.replace("/", "."): value for name, value in self._parameters_by_name.items()}
