"""tools/train_shakespeare.py at a tiny size on the CPU: what it reads, scores and writes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import gpt2cupy
from gpt2cupy.record import ROOT

torch = pytest.importorskip("torch", reason="parity needs torch and transformers")
sys.path.insert(0, str(ROOT / "tools"))
shakespeare_data = importlib.import_module("shakespeare_data")
shakespeare_model = importlib.import_module("shakespeare_model")

TEXT = "".join(
    f"\n\nKING {name}:\n{line}, and so say I."
    for name in ("JOHN", "LEAR", "HENRY") * 40
    for line in ("O, what a day is this", "Away with him", "The crown is thine, good cousin")
).strip()
TINY = "--steps 6 --warmup 2 --eval-every 3 --batch 2 --n-positions 16 --n-embd 64 --n-layer 1"


def run(corpus: Path, out: Path, *options: str) -> dict:
    """Train on a corpus, and return the run's log."""
    script = [sys.executable, ROOT / "tools" / "train_shakespeare.py", corpus, "--out", out]
    tiny = [*TINY.split(), "--device", "cpu", "--vocab-size", "280"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, script), *tiny, *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "train_log.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture(scope="module")
def teacher(corpus) -> Path:
    folder = corpus.parent / "teacher"
    run(corpus, folder, "--train-to", "80", "--dev-to", "90", "--stride", "5")
    return folder


def test_the_parts_follow_each_other():
    data = bytes(range(97, 117)) * 5
    text, dev = shakespeare_data.split_corpus(data, 80, 90)
    assert (text.encode(), dev.encode()) == (data[:80], data[80:90])
    assert shakespeare_data.split_corpus(data, 90, 90)[1] == ""


def test_the_dev_score_is_that_of_score(corpus, teacher):
    result = json.loads((teacher / "train_log.json").read_text())["result"]
    data = corpus.read_bytes()
    _, dev = shakespeare_data.split_corpus(data, 80, 90)
    assert result["dev_bytes"] == len(dev)
    with gpt2cupy.load(teacher, device="cpu", dtype="float32") as lm:
        ours = lm.score(dev, window=16, stride=5).bits_per_byte(dev)
    assert ours == pytest.approx(result["dev_bits_per_byte"], abs=2e-4)


def test_a_refit_scores_nothing_and_never_reads_the_last_part(corpus, teacher, tmp_path):
    other = tmp_path / "other.txt"
    kept = len(TEXT.encode()) * 90 // 100
    other.write_bytes(corpus.read_bytes()[:kept] + b"x" * (len(TEXT.encode()) - kept))
    options = ("--train-to", "90", "--dev-to", "90", "--teachers", str(teacher), "--dropout", "0")
    with ThreadPoolExecutor() as side_by_side:
        logs = list(
            side_by_side.map(
                lambda path: run(path, tmp_path / path.stem, *options), (corpus, other)
            )
        )
    assert logs[0]["result"]["train_bytes"] == kept
    assert "dev_bits_per_byte" not in logs[0]["result"]
    assert [len(row) for row in logs[0]["curve"]] == [2, 2]
    folders = [tmp_path / path.stem for path in (corpus, other)]
    for name in ("model.safetensors", "merges.txt"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_the_folder_loads_in_transformers(teacher, hugging_face):
    ids = [[5, 17, 260]]
    theirs = hugging_face(teacher)(torch.tensor(ids)).logits.detach().numpy()
    with torch.no_grad():
        ours = shakespeare_model.load_teacher(teacher)(torch.tensor(ids)).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_batches_stay_within_the_epoch():
    ids = torch.arange(100)
    ids[60:] = -1  # left from a longer epoch
    starts = torch.tensor([0, 20, 58])
    torch.manual_seed(0)
    for _ in range(50):
        rows = shakespeare_data.draw_batch(ids, torch.tensor(60), starts, 32, 10, 999)
        assert rows.min() >= 0
        opened = rows[rows[:, 0] == 999]
        assert set(opened[:, 1].tolist()) <= {0, 20}


def test_epochs_spell_the_text():
    tokenizer = shakespeare_data.train_tokenizer(TEXT, 280)
    corpus = shakespeare_data.Corpus(TEXT, tokenizer, 0.5, np.random.default_rng(0))
    plain, _ = corpus.epoch(0.0)
    split, starts = corpus.epoch(1.0)
    assert tokenizer.encode(TEXT).ids == plain.tolist()
    assert len(plain) < len(split) <= corpus.capacity
    assert tokenizer.decode(split.tolist()) == TEXT
    assert tokenizer.decode(split[starts[1] :].tolist()).startswith("KING JOHN:\nAway")
