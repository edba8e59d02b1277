"""Cached against whole forward passes, step by step: `gpt2cupy validate` as a record.

    python bench/validation.py [--model shakespeare] [--steps 128] [--batch 2] [--out FILE]

--model is a checkpoint, or a size (124M, 355M, 774M, 1558M, tiny) with random weights. Every
comparison is kept with its largest differences; of those between the cache and whole forward
passes some steps of the first row too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import traced
from arguments import main, parsed, parser
from shared import SIZES, config_of, write_checkpoint

from gpt2cupy import record
from gpt2cupy.errors import Gpt2CupyError


def shown_steps(steps: int) -> list[int]:
    """Steps whose figures are kept: 0, 1, 2, 4, 8 and so on, and the last."""
    return sorted({0, steps - 1, *(2**n for n in range(steps.bit_length()) if 2**n < steps)})


def shortened(comparison: dict[str, Any], steps: int) -> dict[str, Any]:
    """A comparison of validate without most of its steps."""
    every = comparison["steps"]
    kept = set(shown_steps(steps)) if comparison["against"] == "full" else set()
    return comparison | {
        "steps": [each for each in every if each["row"] == 0 and each["step"] in kept],
        "compared": len(every),
        "agreeing": sum(each["agrees"] for each in every),
        "largest_kl": max((each["kl"] for each in every), default=0.0),
    }


def validated(model: str, args: Any) -> dict[str, Any]:
    """What the command says about a model, as JSON."""
    command = ["validate", "--json", "--model", model, "--device", args.device]
    command += ["--steps", str(args.steps), "--batch", str(args.batch)]
    done = traced.run("gpt2cupy", *command, cwd=record.ROOT)
    try:
        return json.loads(done.stdout)  # a check that failed is a result too
    except ValueError:
        raise Gpt2CupyError(done.stderr.strip() or "validate said nothing") from None


def run() -> None:
    options = parser(__doc__, "validate.json")
    options.add_argument("--model", default="shakespeare")
    options.add_argument("--steps", type=int, default=128)
    options.add_argument("--batch", type=int, default=2)
    args = parsed(options)
    with tempfile.TemporaryDirectory() as folder:
        where = args.model
        if args.model in (*SIZES, "tiny"):
            where = folder
            write_checkpoint(Path(folder), config_of(args.model), "float16")
        found = validated(where, args)
    results = {"model": args.model, "steps": args.steps, "batch": args.batch}
    results |= {"passed": found["passed"]}
    results["comparisons"] = [shortened(each, args.steps) for each in found["comparisons"]]
    print(f"{args.model}: {'passed' if found['passed'] else 'FAILED'}")
    record.write(args.out, results, gpu=args.device != "cpu")


if __name__ == "__main__":
    main(run)
