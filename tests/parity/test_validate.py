"""gpt2cupy validate --against hf: the same checkpoint passes, one changed element is found."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from builders import TINY, model_on, write_checkpoint
from error_rule import DTYPES

from gpt2cupy import GPT2, GPT2Config, decode
from gpt2cupy.cli.validation import Settings, run
from gpt2cupy.errors import CheckpointError, Gpt2CupyError
from gpt2cupy.loading import weight_tensors
from gpt2cupy.validate import (
    Limit,
    random_ids,
    runs,
)
from gpt2cupy.weights import Weights

GPT2_SHAPE = GPT2Config.from_name("gpt2")
LIMIT = Limit(1e-6, 1e-7, 1e-7)


def failures(comparisons):
    return [(c.ours, c.against, c.max_abs, c.limit.max) for c in comparisons if not c.passed]


@pytest.fixture
def hugging_face():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from gpt2cupy.validate import huggingface

    return huggingface


def against(hugging_face, model, folder, ids):
    return hugging_face.compare(model, hugging_face.load(folder), ids)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_checkpoint_passes_against_hugging_face(tmp_path, xp, hugging_face, seed):
    weights = write_checkpoint(tmp_path, TINY, seed)
    model = model_on(xp, TINY, weights)
    found = against(hugging_face, model, tmp_path, random_ids(model, 2, 30, seed))
    names = ["embedding", "layer 0", "layer 1", "logits", *decode.usable(model, 2)]
    assert list(dict.fromkeys(c.ours for c in found)) == names
    assert not failures(found)


@pytest.mark.parametrize("dtype_name", ["float16", "bfloat16"])
def test_their_float64_has_the_values_that_a_narrow_model_holds(tmp_path, hugging_face, dtype_name):
    stored = Weights.random(TINY, 5)
    stored.proj_b[...] *= 50  # of the residual stream: held in float32 whatever the dtype
    write_checkpoint(tmp_path, TINY, weights=stored)
    held = Weights.from_tensors(TINY, weight_tensors(TINY, stored), DTYPES[dtype_name])
    model = GPT2(TINY, held)
    ids = random_ids(model, 2, 20)
    found = against(hugging_face, model, tmp_path, ids)
    assert not failures(found) and {c.dtype for c in found} == {dtype_name}
    exact = runs.exact(TINY, held, ids)
    (logits,) = (c for c in found if c.ours == "logits")
    for step in logits.steps:
        best = exact[step.row, step.step].max()
        assert step.reference_top[0][1] == pytest.approx(best, rel=1e-9)


CHANGES = [
    *[(name, layer, f"layer {layer}") for name in ("qkv_w", "proj_w", "fc_w", "out_w")
      for layer in range(TINY.n_layer)],
    ("wte", None, "embedding"),
    ("wpe", None, "embedding"),
]  # fmt: skip


@pytest.mark.parametrize("name, layer, first", CHANGES)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])  # of the rows: of qkv_w query, key and value
def test_one_changed_element_is_found_and_its_layer_named(
    tmp_path, hugging_face, name, layer, first, part
):
    weights = write_checkpoint(tmp_path / "right", TINY, 4)
    ids = random_ids(GPT2(TINY, weights), 2, 30, 1)
    array = getattr(weights, name)
    array = array if layer is None else array[layer]
    row = int(part * len(array))
    if name == "wte":
        row = int(ids[0, 3])
    if name == "wpe":
        row = int(part * 30)
    array[row, 7] += 1.0
    write_checkpoint(tmp_path / "changed", TINY, weights=weights)
    model = GPT2.from_pretrained(str(tmp_path / "changed"), device="cpu")
    found = against(hugging_face, model, tmp_path / "right", ids)
    wrong = [c.ours for c in found if not c.passed]
    assert wrong[0] == first
    assert {"logits", "eager"} <= set(wrong)


def test_a_changed_head_is_found_in_the_logits(tmp_path, hugging_face):
    config = dataclasses.replace(TINY, tie_word_embeddings=False)
    weights = write_checkpoint(tmp_path, config, 4)
    weights.lm_head[20, 3] += 1.0
    model = GPT2(config, weights)
    found = against(hugging_face, model, tmp_path, random_ids(model, 1, 5))
    assert [c.ours for c in found if not c.passed] == ["logits", "eager"]


def test_the_command_names_the_first_layer_that_differs(tmp_path, hugging_face, capsys):
    weights = write_checkpoint(tmp_path / "right", TINY, 4)
    weights.proj_w[1, 3, 5] += 1.0
    write_checkpoint(tmp_path / "changed", TINY, weights=weights)
    settings = {"steps": 12, "device": "cpu", "against": "hf"}
    assert run(Settings(str(tmp_path / "right"), **settings))
    changed = Settings(str(tmp_path / "changed"), **settings, reference=str(tmp_path / "right"))
    assert not run(changed)
    assert "FAIL: 3 of 5" in capsys.readouterr().out
    assert not run(changed, as_json=True)
    output = capsys.readouterr()
    assert "first layer 1 against hf float64" in output.err
    assert [c["ours"] for c in json.loads(output.out)["comparisons"] if not c["passed"]] == [
        "layer 1",
        "logits",
        "eager",
    ]


def test_references_that_do_not_fit_are_refused(tmp_path, hugging_face):
    model = GPT2(TINY, Weights.random(TINY, 0))
    other = GPT2Config(vocab_size=50, n_positions=48, n_embd=32, n_layer=2, n_head=2)
    write_checkpoint(tmp_path / "other", other)
    ids = np.zeros((1, 3), np.int32)
    with pytest.raises(CheckpointError, match="vocab_size 211, the reference 50"):
        against(hugging_face, model, tmp_path / "other", ids)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        hugging_face.load(tmp_path / "nowhere")
    (tmp_path / "model.bin").write_bytes(b"llm.c")
    with pytest.raises(CheckpointError, match=r"layout only.*--reference"):
        hugging_face.load(tmp_path / "model.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="cannot load the reference"):
        hugging_face.load(tmp_path / "empty")


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Gpt2CupyError, match=r"pip install 'gpt2cupy\[parity\]'"):
        run(Settings(steps=2, device="cpu", against="hf"))
