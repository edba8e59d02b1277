"""GPT2Config: the shape of a GPT-2 under Hugging Face's field names, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, shown
from .file_kinds import HEAD, LFS, POINTER, kind_of
from .files import read_plain

# How Hugging Face spells the activations of GPT-2 checkpoints -> our op names.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

# Other names of the same fields, which Hugging Face's GPT2Config takes first.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_FLAGS = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
)
# Options that would change the result and that are not there, with what they do.
_UNSUPPORTED = {
    "add_cross_attention": "cross attention",
    "pruned_heads": "pruned heads",
    "quantization_config": "quantised weights",
}

_SHAPES = {  # n_layer, n_head, n_embd of the published checkpoints
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "distilgpt2": (6, 12, 768),
}


_MAX_BYTES = 16 << 20  # of a config.json, which may name many classes


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
    eos_token_id: int | tuple[int, ...] | None = 50256

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            object.__setattr__(self, name, _plain(value))
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if not ((_is_int(value) and value >= 1) or (name == "n_inner" and value is None)):
                raise ConfigError(
                    f"{name} must be a positive integer, not {shown(value)}",
                    where=name,
                    remedy="Check that the file belongs to a GPT-2 checkpoint.",
                )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be true or false, not {shown(getattr(self, name))}",
                    where=name,
                    remedy="Correct the value; left out, it has Hugging Face's default.",
                )
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}",
                where="n_head",
                remedy="Each head takes n_embd / n_head channels; correct one of the two.",
            )
        known = isinstance(self.activation_function, str)
        if not known or self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"unknown activation_function {shown(self.activation_function)}",
                where="activation_function",
                remedy=f"Supported: {', '.join(ACTIVATIONS)}.",
            )
        eps = self.layer_norm_epsilon
        if not (_is_int(eps) or isinstance(eps, float)) or not 0 <= eps < math.inf:
            raise ConfigError(
                f"layer_norm_epsilon must be a number from 0 up, not {shown(eps)}",
                where="layer_norm_epsilon",
                remedy="GPT-2 uses 1e-5.",
            )
        for name in ("bos_token_id", "eos_token_id"):
            self._check_token(name)

    def _check_token(self, name: str) -> None:
        value = getattr(self, name)
        several = name == "eos_token_id"
        ids = tuple(value) if isinstance(value, list | tuple) else (value,)
        ids = tuple(id_ for id_ in ids if id_ is not None)
        if not all(map(_is_int, ids)) or (len(ids) > 1 and not several):
            raise ConfigError(
                f"{name} must be an integer{', several' * several} or null, not {shown(value)}",
                where=name,
                remedy="Correct the value, or leave it out.",
            )
        # Small models keep the default 50256, which they can never produce: it ends nothing.
        inside = tuple(id_ for id_ in ids if 0 <= id_ < self.vocab_size)
        kept = inside if len(inside) > 1 else inside[0] if inside else None
        object.__setattr__(self, name, kept)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        value = self.eos_token_id
        return value if isinstance(value, tuple) else () if value is None else (value,)

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
        if not isinstance(name, str) or name not in _SHAPES:
            raise ConfigError(
                f"no published GPT-2 is called {shown(name)}",
                where="from_name",
                remedy=f"Names: {', '.join(_SHAPES)}.",
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
        path, data = Path(path), b""
        try:
            data = read_plain(path, _MAX_BYTES)
            fields = json.loads(data)
        except (OSError, ValueError, RecursionError) as error:
            if kind_of(data[:HEAD]) == LFS:
                raise ConfigError(POINTER[0], where=str(path), remedy=POINTER[1]) from None
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
        """Make a configuration from Hugging Face fields; unknown fields that cannot matter pass.

        ``n_ctx``, which old files have beside ``n_positions``, is one of them.
        """
        kind = fields.get("model_type", "gpt2")
        if kind != "gpt2":
            raise ConfigError(
                f"this is a {shown(kind)} checkpoint, not a GPT-2",
                where=where,
                remedy="gpt2cupy runs GPT2LMHeadModel checkpoints only.",
            )
        for option, meaning in _UNSUPPORTED.items():
            if fields.get(option):
                raise ConfigError(
                    f"{meaning} ({option}) is not supported",
                    where=where,
                    remedy="Use a plain decoder-only GPT-2 checkpoint.",
                )
        names = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in fields.items() if key in names}
        known |= {name: fields[alias] for alias, name in _ALIASES.items() if alias in fields}
        try:
            return cls(**known)
        except ConfigError as error:
            # The file is more use than the field, which the sentence names already.
            raise ConfigError(error.what, where=where, remedy=error.remedy) from None


def _plain(value: Any) -> Any:
    """A number of another kind, as NumPy's scalars are, as Python's."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, int | float):
        return float(value)
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
