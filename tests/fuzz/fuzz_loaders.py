"""Coverage-guided fuzzing of every loader and of the tokenizer, bounded in time and memory.

    python tests/fuzz/fuzz_loaders.py --seconds 60

Each input picks a loader by its first byte and is written in the place of one
file of a small valid checkpoint. Anything but the package's own errors is a
crash: the exit code is not 0, and the input lies under build/fuzz (give its path
as the argument to run it alone). Where atheris has no wheel for this Python, it
says so and exits with 0: the hypothesis tests of tests/checkpoint/test_fuzz.py
cover the same ground without guidance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    print("skipped: atheris is not installed (pip install atheris)", file=sys.stderr)
    sys.exit(0)

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["gpt2cupy"]):
    from gpt2cupy import GPT2Config, checkpoint
    from gpt2cupy.errors import Gpt2CupyError
    from gpt2cupy.tokenizer import Tokenizer
    from gpt2cupy.weights import Weights

import numpy as np
from builders import (
    small_bpe,
    tokenizer_json,
    write_bpe,
    write_checkpoint,
    write_llmc,
    write_llmc_tokenizer,
)
from torch_writer import nanogpt, nanogpt_tensors, write_legacy, write_zip

ARTIFACTS = Path(__file__).parents[2] / "build" / "fuzz"
CONFIG = GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=2)


def load(path: Path) -> None:
    found = checkpoint.open(path)
    Weights.from_tensors(found.config, found.tensors(finite=True), np.float32)


def tokenize(path: Path) -> None:
    tokenizer = Tokenizer.from_path(path)
    text = " the aaaa é<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


class Target:
    """A file that inputs replace, and what is then read."""

    def __init__(self, file: Path, read, opened: Path | None = None) -> None:
        self.file, self.read, self.opened = file, read, opened or file
        self.whole = file.read_bytes()

    def __call__(self, data: bytes) -> None:
        self.file.write_bytes(data)
        try:
            self.read(self.opened)
        except Gpt2CupyError as error:
            str(error).encode()
        finally:
            self.file.write_bytes(self.whole)


def targets(folder: Path) -> list[Target]:
    single, shards, words, whole = (folder / name for name in ("single", "shards", "words", "json"))
    write_checkpoint(single, CONFIG)
    write_checkpoint(shards, CONFIG, shards=2)
    write_bpe(words, *small_bpe())
    whole.mkdir()
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    words_json = tokenizer_json(*small_bpe(), post_processor=template)
    (whole / "tokenizer.json").write_text(json.dumps(words_json))
    write_llmc(folder / "model.bin", CONFIG, Weights.random(CONFIG, 0))
    saved = nanogpt(CONFIG, nanogpt_tensors(CONFIG, Weights.random(CONFIG, 0)))
    write_zip(folder / "ckpt.pt", saved)
    write_legacy(folder / "old.pt", saved)
    tokens = [bytes([byte]) for byte in range(256)] + [b"<|endoftext|>"]
    write_llmc_tokenizer(folder / "tokenizer.bin", tokens, 256)
    return [
        Target(single / "config.json", load, single),
        Target(single / "model.safetensors", load, single),
        Target(shards / "model.safetensors.index.json", load, shards),
        Target(folder / "model.bin", load),
        Target(folder / "ckpt.pt", load),
        Target(folder / "old.pt", load),
        Target(words / "vocab.json", tokenize, words),
        Target(words / "merges.txt", tokenize, words),
        Target(whole / "tokenizer.json", tokenize, whole),
        Target(folder / "tokenizer.bin", tokenize),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="stop after this time")
    parser.add_argument("inputs", nargs="*", help="files to run once each, in place of fuzzing")
    given = parser.parse_args()
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = targets(folder)
        plain = Tokenizer.from_path(folder / "tokenizer.bin")

        def one_input(data: bytes) -> None:
            kind = data[0] % (len(every) + 1) if data else 0
            if kind < len(every):
                every[kind](data[1:])
            else:
                text = data[1:].decode("utf-8", "replace")
                assert plain.decode(plain.encode(text)) == text

        corpus = folder / "corpus"
        corpus.mkdir()
        for number, target in enumerate(every):
            (corpus / str(number)).write_bytes(bytes([number]) + target.whole)
        options = [
            *(f"-max_total_time={given.seconds}", "-rss_limit_mb=2048", "-timeout=20"),
            *("-max_len=65536", f"-artifact_prefix={ARTIFACTS}/"),
        ]
        atheris.Setup([sys.argv[0], *options, *(given.inputs or [str(corpus)])], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
