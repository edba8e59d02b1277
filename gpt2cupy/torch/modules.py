"""Modules with the state of PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .norms import layer_norm, rms_norm
from .products import ffn


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


class FeedForward(torch.nn.Module):
    """The feed-forward network of a layer, by our kernels; for inference.

    ``linear1`` and ``linear2`` are PyTorch's modules, named as in its transformer layers, whose
    parameters it takes. Call it under ``torch.inference_mode()`` or ``no_grad()``.

    Parameters
    ----------
    embed_dim, ffn_dim : int
    activation : {"gelu_tanh", "gelu_erf", "relu", "silu", "tanh"}
    bias : bool
    device, dtype
        As ``torch.nn.Linear`` takes them.
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        *,
        activation: str = "gelu_tanh",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.linear1 = torch.nn.Linear(embed_dim, ffn_dim, **made)
        self.linear2 = torch.nn.Linear(ffn_dim, embed_dim, **made)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The network of x [..., embed_dim], and the residual of its shape added."""
        one, two = self.linear1, self.linear2
        return ffn(
            x, one.weight, one.bias, two.weight, two.bias,
            activation=self.activation, residual=residual,
        )  # fmt: skip


def _refuse_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise InputError(
            f"kernels normalise the last dimension, not {list(shape)}",
            where="gpt2cupy.torch: normalized_shape",
            remedy="Flatten these dimensions, or take PyTorch's own module.",
        )
