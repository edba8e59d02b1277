"""What weight-only int8 costs in numbers: bits per byte of a text, and the error of the logits.

    python bench/quantization.py --text FILE [--bytes 20000] [--random 124M] [--out FILE]

Two models: the embedded one on the first bytes of a text, and one of random weights
on random ids. The error of the logits is against the same model in float32 with
weights as they are stored, on the same device; "of their RMS" is relative to those
logits. "int8 but wte" leaves the token embedding, which is also the logits' matrix,
as it is stored, and tells what that one costs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arguments import chosen, main, parsed, parser
from shared import SIZES, config_of

from gpt2cupy import GPT2, GPT2Config, checkpoint, record
from gpt2cupy.errors import InputError
from gpt2cupy.generation.scoring import Scorer, token_logprobs
from gpt2cupy.ids import check_tokens
from gpt2cupy.loading import place, resolve_device, resolve_dtype, weight_tensors
from gpt2cupy.quantize import through_int8
from gpt2cupy.tokenizer import Tokenizer
from gpt2cupy.weights import Weights

TOKENS = 64  # of the random model's input
SHARE = 0.9  # of a text that may be read: the rest of the corpus is for the model's own score
Tensors = Callable[[], Any]


def variants(kind: str) -> dict[str, tuple[str, str]]:
    """Name -> (how the matrices are held, dtype of the rest); the first is what others err from."""
    found = {
        "stored": ("stored", "float32"),
        "int8": ("int8", "float32"),
        "int8 but wte": ("int8 but wte", "float32"),
    }
    if kind == "cuda":
        for dtype in ("float16", "bfloat16"):
            found |= {f"stored, {dtype}": ("stored", dtype), f"int8, {dtype}": ("int8", dtype)}
    return found


def model_of(
    config: GPT2Config, tensors: Tensors, matrices: str, dtype: str, kind: str, index: int
) -> GPT2:
    held = resolve_dtype(dtype, np.dtype(np.float32), kind)
    if matrices == "int8":
        return GPT2(config, place(config, tensors(), held, kind, index, quantize="int8"))
    given = tensors()
    if matrices == "int8 but wte":
        given = (item if item[0] == "wte" else next(iter(through_int8([item]))) for item in given)
    return GPT2(config, place(config, given, held, kind, index))


def weight_bytes(config: GPT2Config, matrices: str, dtype: str) -> int | None:
    """What a GPU would hold; None for what is only tried here."""
    if matrices == "int8 but wte":
        return None
    held = resolve_dtype(dtype, np.dtype(np.float32), "cuda")
    return Weights.empty(config, held, quantize=None if matrices == "stored" else matrices).nbytes


def compared(
    config: GPT2Config, tensors: Tensors, ids: np.ndarray, text: np.ndarray | None, device: str
) -> list[dict[str, Any]]:
    """A row for each variant; bits per byte are left to the caller, who knows the bytes."""
    kind, index = resolve_device(device)
    rows, exact = list[dict[str, Any]](), None
    for name, (matrices, dtype) in variants(kind).items():
        model = model_of(config, tensors, matrices, dtype, kind, index)
        logits = model(ids[None])
        logits = logits if model.xp is np else logits.get()
        exact = logits if exact is None else exact
        apart = logits.astype(np.float64) - exact
        row: dict[str, Any] = {"weights": name, "matrices": matrices, "dtype": dtype}
        row["weight_bytes"] = weight_bytes(config, matrices, dtype)
        row["logit_rms_error"] = float(np.sqrt(np.mean(apart**2)))
        row["logit_max_error"] = float(np.abs(apart).max())
        row["logit_rms_error_of_rms"] = row["logit_rms_error"] / float(np.sqrt(np.mean(exact**2)))
        if text is not None:
            window = config.n_positions
            (logprobs,) = token_logprobs(Scorer(model), [(text, 1)], window, window // 2)
            row["bits"] = -float(logprobs.sum(dtype=np.float64)) / np.log(2)
        rows.append(row)
        del model
        gc.collect()
    return rows


def embedded(path: Path, size: int, device: str) -> dict[str, Any]:
    """The embedded model on the first ``size`` bytes of a text."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}", where="--text", remedy="Name a text file."
        ) from error
    given = raw[: min(size, int(len(raw) * SHARE))].decode("utf-8", "ignore")
    source = checkpoint.open("shakespeare")
    tokenizer = Tokenizer.from_path(source.path)
    tokens = check_tokens([tokenizer.eot_token, *tokenizer.encode(given)], source.config)
    ids = tokens[: source.config.n_positions]
    rows = compared(source.config, source.tensors, ids, tokens, device)
    count = len(given.encode())
    for row in rows:
        row["bits_per_byte"] = row.pop("bits") / count
    about = {"text": path.name, "text_bytes": count, "logit_tokens": len(ids)}
    return {"model": "shakespeare"} | about | {"rows": rows}


def random(size: str, device: str) -> dict[str, Any]:
    """A model of random weights on random ids."""
    config = config_of(size)
    weights = Weights.random(config, 0)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, TOKENS)
    rows = compared(config, lambda: weight_tensors(config, weights), ids, None, device)
    return {"model": f"{size}, random weights", "logit_tokens": TOKENS, "rows": rows}


def run() -> None:
    options = parser(__doc__, "quantization.json", devices=("auto", "cuda", "cpu"))
    options.set_defaults(device="auto")
    options.add_argument("--text", type=Path, required=True, help="what the embedded model scores")
    options.add_argument("--bytes", type=int, default=20000, help="of the text, from its beginning")
    options.add_argument("--random", default="124M", help="a size of GPT-2, tiny, or none")
    args = parsed(options)
    chosen([args.random], [*SIZES, "tiny", "none"], "model")
    models = [embedded(args.text, args.bytes, args.device)]
    if args.random != "none":
        models.append(random(args.random, args.device))
    for each in models:
        for row in each["rows"]:
            bits = f"{row['bits_per_byte']:.4f} bits/byte, " if "bits_per_byte" in row else ""
            print(
                f"{each['model']}, {row['weights']}: {bits}logits off by "
                f"{row['logit_rms_error']:.2e} RMS, {row['logit_max_error']:.2e} at most"
            )
    on_gpu = resolve_device(args.device)[0] == "cuda"
    record.write(args.out, {"models": models}, gpu=on_gpu)


if __name__ == "__main__":
    main(run)
