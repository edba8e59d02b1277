"""Live comparisons with transformers in float32 on the CPU."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import BFLOAT16, write_bpe, write_llmc, write_llmc_tokenizer

import gpt2cupy
from gpt2cupy import GPT2Config, checkpoint
from gpt2cupy.tokenizer import BYTE_SYMBOLS, END_OF_TEXT, Tokenizer
from gpt2cupy.weights import Weights

sys.path.insert(0, str(Path(__file__).parent))
from chosen import VARIABLE, Source, is_gpt2_124m

EMBEDDED = Path(gpt2cupy.__file__).parent / "models" / "shakespeare"
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("GPT2CUPY_TEST_DATA", ROOT.parent / "shared" / "data"))

# Threads that spin while they wait make torch many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def hugging_face() -> Callable[..., Any]:
    """Load a folder or hub id as GPT2LMHeadModel in float32."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def load(name: str | Path, attention: str = "eager") -> Any:
        model = transformers.GPT2LMHeadModel.from_pretrained(name, attn_implementation=attention)
        return model.float().eval()

    return load


@pytest.fixture(scope="session")
def their_logits() -> Callable[[Any, Any], np.ndarray]:
    """Logits [B, T, V] of their model for ids [B, T]."""
    torch = pytest.importorskip("torch")

    def logits(model: Any, ids: Any) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.as_tensor(np.atleast_2d(ids))).logits.numpy()

    return logits


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    return EMBEDDED


@pytest.fixture(scope="session")
def embedded() -> Iterator[gpt2cupy.LanguageModel]:
    with gpt2cupy.load(device="cpu") as lm:
        yield lm


@pytest.fixture(scope="session")
def their_embedded(hugging_face: Callable[..., Any]) -> Any:
    return hugging_face(EMBEDDED)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    """A folder with GPT-2's vocab.json and merges.txt, made from its merges alone."""
    path = DATA / "gpt2-merges.bpe"
    if not path.is_file():
        pytest.skip("GPT-2's merges are not there: tools/fetch_data.py, GPT2CUPY_TEST_DATA")
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines]
    tokens = [*BYTE_SYMBOLS, *(left + right for left, right in merges), END_OF_TEXT]
    folder = tmp_path_factory.mktemp("gpt2")
    write_bpe(folder, {token: id_ for id_, token in enumerate(tokens)}, merges)
    return folder


def random_folder(folder: Path, words: Path) -> Path:
    """A small model of random weights with GPT-2's vocabulary, written by transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_positions=256, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3
    )
    transformers.set_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(words / name, folder)
    return folder


def random_llmc(folder: Path, words: Path) -> Path:
    """The same as llm.c's two files."""
    config = GPT2Config(n_positions=256, n_embd=48, n_layer=2, n_head=4)
    weights = Weights.random(config, 0, BFLOAT16)
    for name in ("qkv_w", "fc_w", "out_w", "proj_w", "wte", "wpe"):
        getattr(weights, name)[...] *= 8
    write_llmc(folder / "model.bin", config, weights)
    tokenizer = Tokenizer.from_folder(words)
    tokens = [tokenizer.decode_bytes([id_]) for id_ in range(tokenizer.vocab_size)]
    write_llmc_tokenizer(folder / "gpt2_tokenizer.bin", tokens, tokenizer.eot_token)
    return folder / "model.bin"


@pytest.fixture(scope="session", params=["given", "folder", "llm.c"])
def source(request: pytest.FixtureRequest, tmp_path_factory) -> Source:
    """The model that the environment names, and two random ones that it might name."""
    if request.param == "given":
        given = Source.given()
        if given is None:
            pytest.skip(f"{VARIABLE} names no model (a hub id, a folder or an llm.c file)")
        return given
    words = request.getfixturevalue("gpt2_folder")
    write = {"folder": random_folder, "llm.c": random_llmc}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(write(tmp_path_factory.mktemp("chosen"), words)))
        return Source.given()


@pytest.fixture(scope="session")
def chosen(source: Source, hugging_face) -> Iterator[tuple[gpt2cupy.LanguageModel, Any]]:
    """That model as ours and theirs."""
    with gpt2cupy.load(source.name, device="cpu", tokenizer=source.tokenizer) as lm:
        yield lm, source.theirs(hugging_face)


@pytest.fixture
def gpt2_124m() -> Iterator[gpt2cupy.LanguageModel]:
    """OpenAI's GPT-2 124M, where the environment names it or the hub's cache has it."""
    for source in (Source.given(), Source.cached()):
        if source and is_gpt2_124m(checkpoint.open(source.name)):
            with gpt2cupy.load(source.name, device="cpu", tokenizer=source.tokenizer) as lm:
                yield lm
            return
    pytest.skip(f"the weights of GPT-2 124M are neither cached nor named by {VARIABLE}")
