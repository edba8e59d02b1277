"""Bodies made at random against a real server: it answers each of them and goes on.

    python tests/fuzz/fuzz_server.py [--seconds 600] [--seed 0]

Bodies are JSON of the right and the wrong kinds, JSON cut or changed at random, and bytes. No
answer may be a 5xx, none may be left out, and the server's counts must agree with ours.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from server_process import Served  # noqa: E402

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
FIELDS = (
    "prompt", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop",
    "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "logprobs", "stop_token_ids", "echo", "stream", "stream_options", "ignore_eos", "model",
    "best_of", "suffix", "user", "messages", "tokens", "return_token_strs", "top_logprobs",
)  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind < 2:
        return rng.choice([0, 1, 2, -1, 3, 7, 20, 511, 512, 513, 2**31, 2**63, 2**64, -(2**63)])
    if kind == 2:
        return rng.choice([0.0, 0.5, 1.0, -0.1, 1e-320, 1e38, 1e300, 2.5])
    if kind == 3:
        return rng.choice([True, False, None])
    if kind < 7:
        size = rng.choice([0, 1, 3, 10, 200])
        return "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD7FF)]))
                       for _ in range(size))  # fmt: skip
    if kind == 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {str(value(rng, 9))[:30]: value(rng, depth + 1) for _ in range(rng.randrange(4))}


def body(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(200))
    # What is right is kept small, so that there are many.
    right: dict[str, Any] = {"prompt": "ROMEO:", "max_tokens": rng.randrange(4), "n": 1}
    for name in rng.sample(FIELDS, rng.randrange(4)):
        right[name] = value(rng)
    for name in ("max_tokens", "n"):
        if isinstance(right[name], int) and 4 < right[name] < 600:
            right[name] = 3
    data = bytearray(json.dumps(right).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, end = random.Random(args.seed), time.monotonic() + args.seconds
    found: dict[int, int] = {}
    with Served("--slots", "4", "--max-body", "100000", "--request-timeout", "20") as server:
        while time.monotonic() < end:
            data, path = body(rng), rng.choice(PATHS)
            status, _, answer = server.ask("POST", path, data)
            found[status] = found.get(status, 0) + 1
            if status >= 500 or (status != 200 and "error" not in json.loads(answer)):
                sys.exit(f"{path} answers {status} to {data!r}: {answer!r}")
        counts = server.check_all_answered()
        if counts["client_gone"] or counts["accepted"] != counts["completed"] + counts["error"]:
            sys.exit(f"not every request was answered: {counts}")
    print(f"{sum(found.values()):,} bodies: {dict(sorted(found.items()))}; {counts}")


if __name__ == "__main__":
    main()
