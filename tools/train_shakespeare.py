"""Train the embedded model: a byte-level BPE and a small GPT-2, both from one text file.

The text is split in file order: the first 85 % trains, the next 5 % (dev) tunes and picks the
checkpoint, the last 10 % is the test part, which this script never tokenises or scores. The output
is a folder in Hugging Face layout: config.json, model.safetensors (fp16), vocab.json, merges.txt,
tokenizer_config.json, train_log.json.

A megabyte of text overfits any GPT-2, so besides dropout, weight decay and averaged weights there
are two more remedies: BPE-dropout (the training text is split into tokens anew each epoch, some
merges left out; Provilkov et al., arXiv:1910.13267), which fades to nothing at the end of the run,
and ``--teachers``: distillation from the mean prediction of models that this script made earlier.

    python tools/train_shakespeare.py corpus.txt --out teacher1 --seed 1
    python tools/train_shakespeare.py corpus.txt --out student --teachers teacher1 teacher2
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from shakespeare_data import (
    END_OF_TEXT,
    Corpus,
    draw_batch,
    merges_of,
    split_corpus,
    train_tokenizer,
)
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


# --------------------------------------------------------------------------- training


@torch.no_grad()
def bits_per_byte(model: nn.Module, ids: list[int], n_bytes: int, batch: int = 64) -> float:
    """Score a text by a sliding window whose stride is half the context.

    Window k reads tokens ``k * stride`` to ``k * stride + n_positions`` of the text preceded by
    end-of-text; the first scores all its successors, the others those of their second half, so
    that every token is scored once.
    """
    model.eval()
    window, device = model.shape.n_positions, next(model.parameters()).device
    stride, end_of_text = window // 2, model.shape.vocab_size - 1
    n_windows = max(1, math.ceil(len(ids) / stride) - 1)
    stream = torch.full(((n_windows - 1) * stride + window + 1,), end_of_text)
    stream[1 : len(ids) + 1] = torch.tensor(ids)
    position = torch.arange(n_windows)[:, None] * stride + torch.arange(window)
    scored = position < len(ids)
    scored[1:, : window - stride] = False
    assert scored.sum() == len(ids)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for rows, mask in zip(position.split(batch), scored.split(batch), strict=True):
        logits = model(stream[rows].to(device)).float()
        loss = F.cross_entropy(
            logits.flatten(0, 1), stream[rows + 1].flatten().to(device), reduction="none"
        )
        nats += loss[mask.flatten().to(device)].double().sum()
    model.train()
    return nats.item() / math.log(2) / n_bytes


def make_optimizer(model: GPT2, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW that decays the matrices and leaves biases and norms alone."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def losses(model: GPT2, rows: Tensor, teachers: list[GPT2], alpha: float) -> tuple[Tensor, Tensor]:
    """Return the cross entropy on the text, and its blend with that on the teachers' mean."""
    logits = model(rows[:, :-1]).float()
    hard = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    if not teachers:
        return hard, hard
    with torch.no_grad():
        odds = [F.softmax(teacher(rows[:, :-1]).float(), -1) for teacher in teachers]
        target = sum(odds) / len(odds)
    soft = -(target * F.log_softmax(logits, -1)).sum(-1).mean()
    return hard, torch.lerp(hard, soft, alpha)


def train(args: argparse.Namespace, text: str, dev: str, tokenizer: Tokenizer) -> dict:
    """Train, and return the best averaged weights with the record of the run."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    shape = Shape(args.vocab_size, args.n_positions, args.n_embd, args.n_layer)
    model = GPT2(shape, args.dropout).to(device)
    average = GPT2(shape).to(device)
    average.load_state_dict(model.state_dict())
    params, averages = list(model.parameters()), list(average.parameters())
    teachers = [load_teacher(folder).to(device) for folder in args.teachers]
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    autocast = torch.autocast(device.type, torch.bfloat16)
    corpus = Corpus(text, tokenizer, args.bpe_dropout, np.random.default_rng(args.seed))
    dev_ids, dev_bytes = tokenizer.encode(dev).ids, len(dev.encode())
    best, best_weights, curve = math.inf, {}, []
    began, step, left, done = time.perf_counter(), 0, 0, 0.0
    while done < 1.0:
        if left <= 0:
            ids, starts = (part.to(device) for part in corpus.epoch(1.0 - done))
            left = len(ids)
        left -= args.batch * args.n_positions
        lr = args.lr * min(step / args.warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = draw_batch(ids, starts, args.batch, args.n_positions, args.vocab_size - 1)
        with autocast:
            loss, total = losses(model, rows, teachers, args.alpha)
        total.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(args.ema, step / (step + 10))
        torch._foreach_lerp_([a.data for a in averages], [p.data for p in params], 1.0 - decay)
        elapsed = time.perf_counter() - began
        done = elapsed / args.seconds if args.seconds else step / args.steps
        if step % args.eval_every == 0 or done >= 1.0:
            with autocast:
                score = bits_per_byte(average, dev_ids, dev_bytes)
            curve.append([step, round(loss.item(), 4), round(score, 4)])
            print(f"step {step}  train {loss.item():.4f} nats  dev {score:.4f} bpb", flush=True)
            if score < best:
                best = score
                best_weights = {k: v.clone() for k, v in average.state_dict().items()}
    result = {"seconds": round(elapsed, 1), "steps_done": step}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        average.load_state_dict({k: v.to(dtype) for k, v in best_weights.items()})
        result[f"dev_bits_per_byte_{name}"] = round(bits_per_byte(average, dev_ids, dev_bytes), 5)
    result["parameters"] = sum(p.numel() for p in params)
    return {"weights": best_weights, "shape": shape, "result": result, "curve": curve}


# --------------------------------------------------------------------------- the folder


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
    """Write config.json and model.safetensors (fp16) in Hugging Face layout."""
    halves = {name: tensor.half().cpu().contiguous() for name, tensor in weights.items()}
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


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("corpus", type=Path, help="a UTF-8 text file")
    add("--out", type=Path, default=Path("shakespeare"), help="folder to write")
    add("--steps", type=int, default=5000)
    add("--seconds", type=float, help="train for this long instead of --steps")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--vocab-size", type=int, default=1024, help="256 bytes, merges and end-of-text")
    add("--n-positions", type=int, default=512)
    add("--n-embd", type=int, default=256, help=f"a multiple of the head size, {HEAD_SIZE}")
    add("--n-layer", type=int, default=6)
    add("--batch", type=int, default=32, help="windows of n-positions tokens in a step")
    add("--lr", type=float, default=1e-3, help="peak, after warm-up; then a cosine")
    add("--warmup", type=int, default=100, help="steps")
    add("--weight-decay", type=float, default=0.5)
    add("--dropout", type=float, default=0.2)
    add("--bpe-dropout", type=float, default=0.2)
    add("--ema", type=float, default=0.995, help="decay of the averaged weights")
    add("--teachers", type=Path, nargs="*", default=[], help="folders this script made earlier")
    add("--alpha", type=float, default=0.8, help="share of the teachers in the loss")
    add("--eval-every", type=int, default=100, help="steps")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, write the folder."""
    args = parse_args()
    text, dev = split_corpus(args.corpus.read_bytes())
    tokenizer = train_tokenizer(text, args.vocab_size)
    run = train(args, text, dev, tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out, tokenizer, args.n_positions)
    write_model(args.out, run["shape"], run["weights"])
    log = {
        "args": {k: v for k, v in vars(args).items() if k not in ("corpus", "out", "teachers")}
        | {"corpus": args.corpus.name, "teachers": [folder.name for folder in args.teachers]},
        "versions": {"torch": torch.__version__, "tokenizers": tokenizers.__version__},
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
        "result": run["result"],
        "curve_columns": ["step", "train_nats_per_token", "dev_bits_per_byte"],
        "curve": run["curve"],
    }
    write_json(args.out / "train_log.json", log, indent=None)
    print(json.dumps(run["result"]))


if __name__ == "__main__":
    main()
