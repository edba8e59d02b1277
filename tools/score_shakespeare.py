"""Bits per byte of the embedded model on the part of the corpus it never saw: the last 10 %.

    python tools/score_shakespeare.py tinyshakespeare.txt

Writes bench/results/shakespeare.json. Window and stride are those of score()'s
defaults: the whole context, moved by half of it.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import gpt2cupy
from gpt2cupy import record

WEIGHTS = Path(gpt2cupy.__file__).parent / "models" / "shakespeare" / "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(record.RESULTS / "shakespeare.json"))
    args = parser.parse_args()

    data = args.corpus.read_bytes()
    text = data[len(data) * 90 // 100 :].decode("utf-8")
    with gpt2cupy.load("shakespeare", device=args.device) as lm:
        score = lm.score(text)
        results = {
            "split": "last 10 % by bytes",
            "bytes": len(text.encode()),
            "tokens": len(score.tokens),
            "window": lm.config.n_positions,
            "stride": lm.config.n_positions // 2,
            "device": lm.device,
            "dtype": str(lm.dtype),
            "weights_sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte(text),
        }
    record.write(args.out, results, gpu=args.device != "cpu")
    print(f"{results['bits_per_byte']:.4f} bits per byte over {results['bytes']} bytes")


if __name__ == "__main__":
    main()
