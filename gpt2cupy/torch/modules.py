"""Modules with the state of PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .norms import layer_norm, rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the last dimension, its state dict too, by our kernel."""

    def forward(self, x: Tensor) -> Tensor:
        _refuse_shape(self.normalized_shape)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps)


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension, its state dict too, by our kernel."""

    def forward(self, x: Tensor) -> Tensor:
        _refuse_shape(self.normalized_shape)
        return layer_norm(x, self.weight, self.bias, self.eps)


def _refuse_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise InputError(
            f"kernels normalise the last dimension, not {list(shape)}",
            where="gpt2cupy.torch: normalized_shape",
            remedy="Flatten these dimensions, or take PyTorch's own module.",
        )
