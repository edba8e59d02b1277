"""Train the embedded model: a byte-level BPE and a small GPT-2, both from one text file.

The text is split in file order: what is before ``--train-to`` trains, what follows up to
``--dev-to`` is the dev part, which is only scored, and what follows that is never tokenised or
scored here. With ``--dev-to`` equal to ``--train-to`` there is no dev part: a refit, on all that is
not the test part, of settings that an earlier run's dev part chose. The weights kept are the
averaged ones of the last step. The output is a folder in Hugging Face layout: config.json,
model.safetensors (fp16), vocab.json, merges.txt, tokenizer_config.json, train_log.json.

A megabyte of text overfits any GPT-2, so besides dropout, weight decay and averaged weights there
are two more remedies: BPE-dropout (the training text is split into tokens again each epoch, some
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from shakespeare_data import Corpus, draw_batch, split_corpus, train_tokenizer
from shakespeare_model import (
    GPT2,
    HEAD_SIZE,
    Shape,
    bits_per_byte,
    load_teacher,
    write_json,
    write_model,
    write_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor, nn


def make_optimizer(model: GPT2, lr: Tensor, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW that decays the matrices and leaves biases and norms alone."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True, capturable=lr.is_cuda)


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


class Replayed:
    """A function of no arguments, on a GPU recorded as a CUDA graph after three calls.

    A step is over a thousand kernels of a few microseconds, and launching them one by one takes
    longer than running them.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function, self.calls, self.graph = function, 0, None
        self.side = torch.cuda.Stream() if device.type == "cuda" else None

    def __call__(self) -> None:
        """Run the function, or what was recorded of it."""
        self.calls += 1
        if self.side is None:
            self.function()
        elif self.calls <= 3:  # first calls allocate, on a stream that may be recorded later
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.function()
            torch.cuda.current_stream().wait_stream(self.side)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.function()
            self.graph.replay()


def train(args: argparse.Namespace, text: str, dev: str, tokenizer: Tokenizer) -> dict:
    """Train, and return the averaged weights with the record of the run."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    shape = Shape(args.vocab_size, args.n_positions, args.n_embd, args.n_layer)
    model = GPT2(shape, args.dropout).to(device)
    average = GPT2(shape).to(device)
    average.load_state_dict(model.state_dict())
    params, averages = list(model.parameters()), list(average.parameters())
    teachers = [load_teacher(folder).to(device) for folder in args.teachers]
    lr, train_loss = torch.zeros(2, device=device).unbind()
    optimizer = make_optimizer(model, lr, args.weight_decay)
    autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    corpus = Corpus(text, tokenizer, args.bpe_dropout, np.random.default_rng(args.seed))
    # Every epoch's ids lie in the same memory, since a recorded step reads it again and again.
    ids = torch.zeros(corpus.capacity, dtype=torch.long, device=device)
    starts = torch.zeros(int(corpus.speech.sum()), dtype=torch.long, device=device)
    size = torch.zeros((), dtype=torch.long, device=device)

    def learn() -> None:
        rows = draw_batch(ids, size, starts, args.batch, args.n_positions, args.vocab_size - 1)
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss, total = losses(model, rows, teachers, args.alpha)
        total.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        train_loss.copy_(loss.detach())

    learn_once = Replayed(learn, device)
    dev_ids, dev_bytes = tokenizer.encode(dev).ids, len(dev.encode())
    curve, left, began = [], 0, time.perf_counter()
    for step in range(1, args.steps + 1):
        done = (step - 1) / args.steps
        if left <= 0:
            epoch_ids, epoch_starts = corpus.epoch(1.0 - done)
            left = len(epoch_ids)
            ids[:left].copy_(epoch_ids)
            starts.copy_(epoch_starts)
            size.fill_(left)
        left -= args.batch * args.n_positions
        schedule = 0.02 + 0.49 * (1 + math.cos(math.pi * done))
        lr.fill_(args.lr * min(step / args.warmup, schedule))
        learn_once()
        decay = min(args.ema, step / (step + 10))
        torch._foreach_lerp_([a.data for a in averages], [p.data for p in params], 1.0 - decay)
        if step % args.eval_every == 0 or step == args.steps:
            curve.append([step, round(train_loss.item(), 4)])
            if dev:
                with autocast:
                    score = bits_per_byte(average, dev_ids, dev_bytes, args.n_positions // 2)
                curve[-1].append(round(score, 4))
            print(*curve[-1], flush=True)
    result = {
        "seconds": round(time.perf_counter() - began, 1),
        "parameters": sum(p.numel() for p in params),
        "train_bytes": len(text.encode()),
        "dev_bytes": dev_bytes,
    }
    weights = {name: tensor.half() for name, tensor in average.state_dict().items()}
    if dev:
        average.load_state_dict(weights)
        score = bits_per_byte(average, dev_ids, dev_bytes, args.stride)
        result["dev_bits_per_byte"] = round(score, 4)
    return {"weights": weights, "shape": shape, "result": result, "curve": curve}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("corpus", type=Path, help="a UTF-8 text file")
    add("--out", type=Path, default=Path("shakespeare"), help="folder to write")
    add("--train-to", type=int, default=85, help="percent of the bytes where the train part ends")
    add("--dev-to", type=int, default=90, help="percent of the bytes where the dev part ends")
    add("--steps", type=int, default=5000)
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
    add("--stride", type=int, default=64, help="of the window of the last dev score, in tokens")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, write the folder."""
    args = parse_args()
    text, dev = split_corpus(args.corpus.read_bytes(), args.train_to, args.dev_to)
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
        "curve_columns": ["step", "train_nats_per_token", "dev_bits_per_byte"][: 3 if dev else 2],
        "curve": run["curve"],
    }
    write_json(args.out / "train_log.json", log, indent=None)
    print(json.dumps(run["result"]))


if __name__ == "__main__":
    main()
