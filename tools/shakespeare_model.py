"""The GPT-2 that train_shakespeare.py trains: in PyTorch, scored, and as a Hugging Face folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from shakespeare_data import END_OF_TEXT, merges_of
from tokenizers import Tokenizer
from torch import Tensor, nn

HEAD_SIZE = 64


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2, by their Hugging Face names."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int

    @property
    def n_head(self) -> int:
        """Number of attention heads."""
        return self.n_embd // HEAD_SIZE


class Conv1D(nn.Module):
    """``x @ weight + bias`` with weight [in, out], as GPT-2's checkpoints hold it."""

    def __init__(self, n_in: int, n_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return F.linear(x, self.weight.T, self.bias)


class Block(nn.Module):
    """Pre-norm attention and MLP; parameters are named as Hugging Face names them."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        C, std = shape.n_embd, 0.02
        residual_std = std / math.sqrt(2 * shape.n_layer)
        self.ln_1, self.ln_2 = nn.LayerNorm(C, eps=1e-5), nn.LayerNorm(C, eps=1e-5)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = Conv1D(C, 3 * C, std)
        self.attn.c_proj = Conv1D(C, C, residual_std)
        self.mlp.c_fc = Conv1D(C, 4 * C, std)
        self.mlp.c_proj = Conv1D(4 * C, C, residual_std)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream [B, T, C] to the next."""
        B, T, C = x.shape
        p = self.dropout if self.training else 0.0
        qkv = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, C // HEAD_SIZE, HEAD_SIZE)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, NH, T, HS]
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + F.dropout(self.attn.c_proj(mixed.transpose(1, 2).reshape(B, T, C)), p)
        hidden = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.mlp.c_proj(hidden), p)


class GPT2(nn.Module):
    """GPT-2 with tied embeddings."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.transformer.wpe = nn.Embedding(shape.n_positions, shape.n_embd)
        for embedding in (self.transformer.wte, self.transformer.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        self.transformer.h = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layer))
        self.transformer.ln_f = nn.LayerNorm(shape.n_embd, eps=1e-5)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [B, T] to logits [B, T, V]."""
        gpt = self.transformer
        x = gpt.wte(ids) + gpt.wpe.weight[: ids.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in gpt.h:
            x = block(x)
        return F.linear(gpt.ln_f(x), gpt.wte.weight)


def load_teacher(folder: Path) -> GPT2:
    """Load a model that this script wrote."""
    config = json.loads((folder / "config.json").read_text())
    model = GPT2(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def bits_per_byte(model: GPT2, ids: list[int], n_bytes: int, stride: int, batch: int = 64) -> float:
    """Score a text by a sliding window.

    Window k reads tokens ``k * stride`` to ``k * stride + n_positions`` of the text preceded by
    end-of-text; the first scores all its successors, the others those of their last ``stride``
    tokens, so that every token is scored once.
    """
    window, device = model.shape.n_positions, next(model.parameters()).device
    n_windows = 1 + max(0, math.ceil((len(ids) - window) / stride))
    stream = torch.full(((n_windows - 1) * stride + window + 1,), model.shape.vocab_size - 1)
    stream[1 : len(ids) + 1] = torch.tensor(ids)
    position = torch.arange(n_windows)[:, None] * stride + torch.arange(window)
    scored = position < len(ids)
    scored[1:, : window - stride] = False
    assert scored.sum() == len(ids)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for rows, mask in zip(position.split(batch), scored.split(batch), strict=True):
        logits = model(stream[rows].to(device)).float()
        target = stream[rows + 1].flatten().to(device)
        loss = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
        nats += loss[mask.flatten().to(device)].double().sum()
    return nats.item() / math.log(2) / n_bytes


def write_tokenizer(folder: Path, tokenizer: Tokenizer, n_positions: int) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json as GPT-2's."""
    vocab = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    write_json(folder / "vocab.json", vocab, indent=None)
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges_of(tokenizer)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk")}
    extra = {"add_prefix_space": False, "model_max_length": n_positions}
    config = {"tokenizer_class": "GPT2Tokenizer"} | extra | special
    write_json(folder / "tokenizer_config.json", config)


def write_model(folder: Path, shape: Shape, weights: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors, given in fp16, in Hugging Face layout."""
    halves = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    assert all(tensor.isfinite().all() for tensor in halves.values()), "weights overflow fp16"
    safetensors.torch.save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **asdict(shape),
        "n_head": shape.n_head,
        "n_ctx": shape.n_positions,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": shape.vocab_size - 1,
        "eos_token_id": shape.vocab_size - 1,
        "torch_dtype": "float16",
    }
    write_json(folder / "config.json", config)


def write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    """Write JSON with a newline at its end."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
