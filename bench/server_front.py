"""How many events a front process sends: a mock engine behind it, clients that only count.

    python bench/server_front.py [--streams 32] [--rates 1000,2000,3000] [--seconds 4] [--out FILE]

The mock engine gives each stream a token a step, so many steps a second; a token is an event, its
text included. The most that a front delivers is its ceiling. Needs no GPU.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from arguments import main, numbers, parsed, parser
from serving import Server, load, summary, text_prompts, write_served_checkpoint
from shared import Kept, config_of

from gpt2cupy.tokenizer import Tokenizer


def measure(folder: Path, rate: int, args: Any) -> dict[str, Any]:
    """Events a second of one front where the engine makes ``rate`` steps a second."""
    prompts = text_prompts(Tokenizer.from_path(folder), [args.prompt] * 8)
    bodies = [
        json.dumps(
            {
                "prompt": prompt,
                "max_tokens": args.tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        for prompt in prompts
    ]
    options = ["--model", str(folder), "--engine", f"mock:{rate}", "--event-tokens", "1"]
    with Server(*options, "--slots", str(args.streams)) as server:
        before = server.cpu_seconds()
        job = {"port": server.port, "bodies": bodies, "clients": args.streams}
        seen = load(job | {"seconds": args.seconds + 1}, args.processes)
        wall = float(seen["end"].max() - seen["start"].min())
        cpu = {name: (s - before[name]) / wall for name, s in server.cpu_seconds().items()}
    begin = float(seen["start"].min())
    found = summary(seen, (begin + 0.5, begin + 0.5 + args.seconds))
    return {"steps_per_second": rate, "cpu": cpu, **found}


def run() -> None:
    options = parser(__doc__, "server-front.json", devices=("cpu",))
    options.set_defaults(device="cpu")
    options.add_argument("--model", default="124M")
    options.add_argument("--streams", type=int, default=32)
    options.add_argument("--rates", type=numbers, default=[1000, 2000, 3000, 4000])
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--seconds", type=int, default=4)
    options.add_argument("--processes", type=int, default=2, help="of clients")
    args = parsed(options)
    config = config_of(args.model)
    settings = {"streams": args.streams, "prompt": args.prompt, "tokens": args.tokens}
    with tempfile.TemporaryDirectory() as name, Kept(args.out, settings, gpu=False) as kept:
        folder = Path(name)
        write_served_checkpoint(folder, config, "float16")
        for rate in args.rates:
            row = measure(folder, rate, args)
            kept.rows.append(row)
            print(
                f"{rate} steps/s x {args.streams}: {row['events_per_second']:,.0f} events/s, "
                f"p99 between {row['between_events_ms']['p99']:.2f} ms, "
                f"CPU of the front {row['cpu'].get('front 0', 0):.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main(run)
