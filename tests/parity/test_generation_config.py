"""Beginnings, ends and settings of a checkpoint's files, against transformers' generate()."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import small_bpe, write_bpe, write_checkpoint

import gpt2cupy
from gpt2cupy import GPT2Config
from gpt2cupy.weights import Weights

torch = pytest.importorskip("torch", reason="parity needs torch and transformers")
pytest.importorskip("transformers", reason="parity needs torch and transformers")
pytestmark = pytest.mark.parity

CONFIG = GPT2Config(vocab_size=263, n_positions=64, n_embd=32, n_layer=2, n_head=2)
TOKENS = 24


@pytest.fixture
def both(tmp_path, hugging_face):
    """Their model and ours of a checkpoint with these fields in its files."""
    weights = Weights.random(CONFIG, 0)
    weights.wte[...] *= 8
    write_bpe(tmp_path, *small_bpe())
    write_checkpoint(tmp_path, CONFIG, weights=weights)
    opened = []

    def load(generation: dict | None, config: dict) -> tuple[Any, gpt2cupy.LanguageModel]:
        fields = {**CONFIG.to_dict(), **config}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        file = tmp_path / "generation_config.json"
        file.unlink(missing_ok=True)
        if generation is not None:
            file.write_text(json.dumps({"pad_token_id": 0, **generation}))
        opened.append(gpt2cupy.load(str(tmp_path), device="cpu"))
        return hugging_face(tmp_path), opened[-1]

    yield load
    for lm in opened:
        lm.close()


def theirs(model: Any, ids: list[int] | None, **options) -> list[int]:
    """New tokens that they generate; from the beginning that their files name without ids."""
    given = None if ids is None else torch.tensor([ids])
    mask = {} if ids is None else {"attention_mask": torch.ones_like(given)}
    with torch.inference_mode():
        found = model.generate(given, pad_token_id=0, **mask, **options)
    return found[0, 1 if ids is None else len(ids) :].tolist()


@pytest.mark.parametrize("start", [5, 200])
@pytest.mark.parametrize("place", ["generation_config", "config", "both"])
@pytest.mark.parametrize("several", [False, True])
def test_beginning_and_ends(both, start, place, several):
    none = {"bos_token_id": start, "eos_token_id": None}
    free = theirs(both(None, none)[0], None, max_new_tokens=TOKENS)
    ends = [free[9], free[14]] if several else free[9]
    named = {"bos_token_id": start, "eos_token_id": ends}
    other = {"bos_token_id": 7, "eos_token_id": free[1]}
    generation, config = {
        "generation_config": (named, none),
        "config": (None, named),
        "both": (named, other),
    }[place]
    model, lm = both(generation, config)
    expected = theirs(model, None, max_new_tokens=TOKENS, do_sample=False)
    assert len(expected) <= 10 and expected[-1] in (free[9], free[14])
    ours = lm.generate("", max_new_tokens=TOKENS)
    assert (ours.tokens, ours.finish_reason) == (expected, "eos")
    assert ours.prompt_ids == [start]
    least = theirs(model, None, max_new_tokens=TOKENS, min_new_tokens=13)
    assert lm.generate("", max_new_tokens=TOKENS, min_new_tokens=13).tokens == least


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 11},
        {"repetition_penalty": 1.7, "max_new_tokens": 20},
        {"suppress_tokens": [1, 30, 77, 120], "max_new_tokens": 20},
        {"bad_words_ids": [[30], [44]], "max_new_tokens": 20},
        {"min_new_tokens": 12, "eos_token_id": [30, 31], "max_new_tokens": 20},
        {"temperature": 0.5, "top_k": 3, "max_new_tokens": 9},  # greedy without do_sample
    ],
    ids=str,
)
def test_settings(both, fields):
    free = theirs(both(None, {"eos_token_id": None})[0], [5, 9], max_new_tokens=20)
    # Something of the free text, so that the setting matters.
    fields = json.loads(json.dumps(fields).replace("30", str(free[3])))
    model, lm = both(fields, {"eos_token_id": None})
    expected = theirs(model, [5, 9])
    ours = lm.generate([5, 9], generation_config=True).tokens
    # Without an end of their own ours end where the tokenizer says.
    cut = ours.index(262) + 1 if 262 in ours else len(ours)
    assert ours == expected[:cut]
