"""GPT2Config: the shape of a GPT-2 under Hugging Face's field names, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

# How Hugging Face spells the activations of GPT-2 checkpoints -> our op names.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

_SHAPES = {  # n_layer, n_head, n_embd of the published checkpoints
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "distilgpt2": (6, 12, 768),
}


@dataclass(frozen=True)
class GPT2Config:
    """Shape and options of a GPT-2; field names and defaults are Hugging Face's.

    Raises
    ------
    ConfigError
        If a field has an impossible value or an option that would change the
        result is not supported.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"{name} must be a positive integer, not {value!r}",
                    where="config.json",
                    remedy="Check that the file belongs to a GPT-2 checkpoint.",
                )
        if self.n_inner is not None and (not isinstance(self.n_inner, int) or self.n_inner < 1):
            raise ConfigError(
                f"n_inner must be null or a positive integer, not {self.n_inner!r}",
                where="config.json",
                remedy="null stands for 4 x n_embd.",
            )
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}",
                where="config.json",
                remedy="Each head takes n_embd / n_head channels; correct one of the two.",
            )
        if self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"unknown activation_function {self.activation_function!r}",
                where="config.json",
                remedy=f"Supported: {', '.join(ACTIVATIONS)}.",
            )
        eps = self.layer_norm_epsilon
        if not isinstance(eps, int | float) or not math.isfinite(eps) or eps <= 0:
            raise ConfigError(
                f"layer_norm_epsilon must be a positive number, not {eps!r}",
                where="config.json",
                remedy="GPT-2 uses 1e-5.",
            )

    @property
    def head_size(self) -> int:
        """Channels of one attention head, ``n_embd // n_head``."""
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        """Width of the MLP, ``n_inner`` or four times ``n_embd``."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as it lies in memory: the next multiple of 128."""
        return -(-self.vocab_size // 128) * 128

    @property
    def activation(self) -> str:
        """The activation under the name that ``gpt2cupy.ops`` gives it."""
        return ACTIVATIONS[self.activation_function]

    def attention_scale(self, layer: int) -> float:
        """Factor on the scores ``q . k`` of one layer.

        ``reorder_and_upcast_attn`` changes only the order in which Hugging Face
        applies this same factor, so it needs nothing here: our scores are
        always accumulated in float32.
        """
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def to_dict(self) -> dict[str, Any]:
        """The fields as Hugging Face's ``config.json`` has them."""
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | dataclasses.asdict(
            self
        )

    @classmethod
    def from_name(cls, name: str) -> GPT2Config:
        """The configuration of a published checkpoint.

        Parameters
        ----------
        name : str
            ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl`` or ``distilgpt2``.
        """
        if name not in _SHAPES:
            raise ConfigError(
                f"no published GPT-2 is called {name!r}", remedy=f"Names: {', '.join(_SHAPES)}."
            )
        layers, heads, width = _SHAPES[name]
        return cls(n_layer=layers, n_head=heads, n_embd=width)

    @classmethod
    def from_json(cls, path: str | Path) -> GPT2Config:
        """Read and check a ``config.json``.

        Raises
        ------
        ConfigError
            If the file cannot be read, is not JSON, describes another
            architecture, or sets an option that changes the result and that
            this package does not have.
        """
        path = Path(path)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(
                f"cannot read the configuration: {error}",
                where=str(path),
                remedy="A checkpoint folder needs a valid config.json.",
            ) from error
        if not isinstance(fields, dict):
            raise ConfigError(
                "the configuration is not a JSON object",
                where=str(path),
                remedy="Restore the file.",
            )
        return cls.from_dict(fields, where=str(path))

    @classmethod
    def from_dict(cls, fields: dict[str, Any], *, where: str = "config") -> GPT2Config:
        """Make a configuration from Hugging Face fields; unknown fields that cannot matter pass."""
        kind = fields.get("model_type", "gpt2")
        if kind != "gpt2":
            raise ConfigError(
                f"this is a {kind!r} checkpoint, not a GPT-2",
                where=where,
                remedy="gpt2cupy runs GPT2LMHeadModel checkpoints only.",
            )
        if fields.get("add_cross_attention"):
            raise ConfigError(
                "cross attention is not supported",
                where=where,
                remedy="Use a decoder-only GPT-2 checkpoint.",
            )
        names = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in fields.items() if key in names}
        # Checkpoints of 2019 call the context n_ctx; Hugging Face reads n_positions first.
        if "n_positions" not in known and "n_ctx" in fields:
            known["n_positions"] = fields["n_ctx"]
        return cls(**known)
