"""gpt2cupy.validate: right numbers pass, wrong ones fail and are found, tables and JSON tell it."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from builders import TINY, copied, model_on, with_outliers, write_checkpoint
from error_rule import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gpt2cupy import GPT2, GPT2Config, decode
from gpt2cupy.cli import validation
from gpt2cupy.cli.validation import Settings, run
from gpt2cupy.decode import Decoder, decoder, launched, ops_step
from gpt2cupy.errors import Gpt2CupyError, InputError
from gpt2cupy.record import ROOT
from gpt2cupy.validate import Comparison, Limit, continued, random_ids, runs, table, validate
from gpt2cupy.validate.check import with_decoders
from gpt2cupy.validate.compare import compare_logits, top, worst
from gpt2cupy.weights import Weights

GPT2_SHAPE = GPT2Config.from_name("gpt2")
LIMIT = Limit(1e-6, 1e-7, 1e-7)


def failures(comparisons):
    return [(c.ours, c.against, c.max_abs, c.limit.max) for c in comparisons if not c.passed]


# -- the rule and the figures ----------------------------------------------------------------------


def test_the_limit_is_twice_the_baseline_and_one_ulp():
    exact = np.array([1.0, -3.0])
    limit = Limit.of(np.array([1.0, -2.75]), exact, np.dtype(np.float16))
    assert limit.baseline_max == 0.25 and limit.baseline_rms == pytest.approx(0.25 / 2**0.5)
    assert limit.ulp == 2.0**-9  # of 3.0 in float16
    assert limit.max == 0.5 + 2**-9 and limit.rms == 2 * limit.baseline_rms + 2**-9
    assert limit.admits(limit.max, limit.rms)
    assert not limit.admits(np.nextafter(limit.max, 1), limit.rms)
    assert not limit.admits(limit.max, np.nextafter(limit.rms, 1))
    assert not limit.admits(math.nan, 0.0) and not limit.admits(0.0, math.nan)
    assert Limit(0.25, 0.25, 0.0, sides=2).max == 1.0
    assert not Limit.of(exact, exact * np.nan, np.dtype(np.float32)).admits(0.0, 0.0)


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40))
def test_figures_of_steps_are_those_of_the_formulas(seed, rows, length, vocabulary):
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(size=(2, rows, length, vocabulary))
    found = compare_logits("float32", "a", "b", ours, theirs, LIMIT)
    assert found.max_abs == np.abs(ours - theirs).max()
    assert found.rmse == pytest.approx(np.sqrt(np.mean((ours - theirs) ** 2)))
    assert len(found.steps) == rows * length
    for step in found.steps:
        a, b = ours[step.row, step.step], theirs[step.row, step.step]
        p, q = np.exp(b) / np.exp(b).sum(), np.exp(a) / np.exp(a).sum()
        assert step.max_abs == np.abs(a - b).max()
        assert step.kl == pytest.approx(max(np.sum(p * np.log(p / q)), 0), rel=1e-9, abs=1e-12)
        assert [i for i, _ in step.top] == np.argsort(-a)[:3].tolist()
        assert dict(step.reference_top) == {i: b[i] for i in np.argsort(-b)[:3]}
        assert step.agrees == (a.argmax() == b.argmax())


def test_nan_fails_everywhere_and_json_has_none():
    values = np.zeros((1, 2, 5), np.float32)
    broken = values.copy()
    broken[0, 1, 2] = np.nan
    found = compare_logits("float32", "a", "b", broken, values, Limit(1.0, 1.0, 1.0))
    assert not found.passed
    assert worst(found.steps).step == 1
    assert found.to_dict()["max_abs"] is None
    json.dumps(found.to_dict(), allow_nan=False)
    assert [i for i, _ in top(np.array([np.nan, 2.0, 1.0, 3.0]))] == [3, 1, 2]


# -- right and wrong models ------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", [False, True])
def test_a_right_model_passes(xp, outliers):
    weights = Weights.random(TINY, 0)
    if outliers:
        with_outliers(TINY, weights)
    model = model_on(xp, TINY, weights)
    found = validate(model, random_ids(model, 2, 40), weights=weights)
    assert not failures(found)
    pairs = [(c.ours, c.against) for c in found]
    assert pairs[:3] == [("full", "float64"), ("eager", "float64"), ("eager", "full")]
    usable = set(decode.usable(model, 2))
    assert {ours for ours, _ in pairs} == {"full", *usable}
    others = usable - {"eager"}
    assert {ours for ours, against in pairs if against == "eager"} == others
    assert {len(c.steps) for c in found} == {2 * 40}


def test_only_the_steps_after_the_prompt_are_compared(xp):
    model = model_on(xp, TINY, Weights.random(TINY, 0))
    ids = continued(model, np.array([5, 6, 7], np.int32), 2, 9, seed=1)
    assert ids.shape == (2, 11) and (ids[:, :3] == [5, 6, 7]).all()
    assert (ids[0] != ids[1]).any()
    np.testing.assert_array_equal(ids, continued(model, ids[0, :3], 2, 9, seed=1))
    found = validate(model, ids, prefilled=2)
    assert not failures(found) and len(found[0].steps) == 2 * 9
    whole = validate(model, ids)
    assert whole[0].steps[2 * 2].reference_top == found[0].steps[0].reference_top


def forgetful(model):
    """A decoder that loses the first key of one row."""

    def step(model, state):
        state.cache.k[1, 1, :, 0] = 0
        ops_step(model, state)

    return Decoder(model, step, launched, "forgetful")


def test_a_decoder_that_loses_a_key_fails_where_it_matters():
    model = GPT2(TINY, Weights.random(TINY, 0))
    for name in ("qkv_w", "wte"):  # attention that is far from uniform
        getattr(model.weights, name)[...] *= 8
    ids = random_ids(model, 2, 12)
    exact = runs.exact(TINY, model.weights, ids)
    limit = Limit.of(runs.full(model, ids), exact, model.dtype)
    references = {"float64": exact, "full": runs.full(model, ids)}
    decoders = [decoder(model, "eager"), forgetful(model)]
    found = with_decoders(decoders, ids, 0, references, limit)
    assert [c.passed for c in found] == [True, True, False, False, False]
    assert [c.against for c in found[2:]] == ["float64", "full", "eager"]
    assert {step.row for step in found[4].steps if step.max_abs} == {1}
    # Step 0 writes the key after it was lost: it is right.
    assert min(step.step for step in found[4].steps if step.max_abs) == 1
    assert "FAIL: 3 of 5" in table.verdict(found) and "forgetful" in table.verdict(found)
    assert table.verdict(found[:2]) == "PASS: 2 comparisons within the error rule"


@pytest.mark.parametrize("name", ["qkv_w", "out_w", "lm_head", "ln1_b"])
def test_a_model_with_other_values_than_the_checkpoint_fails(xp, name):
    weights = Weights.random(TINY, 0)
    changed = copied(TINY, weights)
    array = getattr(changed, name)
    array[(0,) * (array.ndim - 1) + (3,)] += 1.0
    model = model_on(xp, TINY, changed)
    # Enough logits that the largest error of neither side is a matter of luck.
    ids = random_ids(model, 2, 40)
    assert failures(validate(model, ids, weights=weights))
    assert not failures(validate(model, ids))  # read back from the model itself


def test_what_cannot_be_validated_is_refused():
    model = GPT2(TINY, Weights.random(TINY, 0))
    ids = random_ids(model, 1, 4)
    with pytest.raises(InputError, match="warp"):
        validate(model, ids, paths=["warp"])
    with pytest.raises(InputError, match="prefilled"):
        validate(model, ids, prefilled=4)
    with pytest.raises(InputError, match="at most 48 steps"):
        random_ids(model, 1, 49)
    with pytest.raises(InputError, match="batch is 0"):
        random_ids(model, 0, 4)
    with pytest.raises(InputError, match="seed is -1"):
        random_ids(model, 1, 4, seed=-1)
    prompt = np.zeros(48, np.int32)
    assert continued(model, prompt, 1, 1).shape == (1, 48)
    with pytest.raises(InputError, match="48 tokens and 2 steps"):
        continued(model, prompt, 1, 2)
    with pytest.raises(InputError, match="the prompt has 49 tokens, the context 48"):
        continued(model, np.zeros(49, np.int32), 1, 1)


# -- tables and the command ------------------------------------------------------------------------


def drawn(comparisons):
    console = Console(file=io.StringIO(), width=160)
    console.print(table.render(comparisons))
    return console.file.getvalue()


def test_the_table_shows_the_edges_and_the_worst_step():
    values = np.random.default_rng(0).normal(size=(2, 20, 9))
    other = values.copy()
    other[1, 11, 4] += 0.5
    text = drawn([compare_logits("float32", "eager", "full", other, values, LIMIT)])
    rows = [
        line.split("│")[1:3] for line in text.splitlines() if "same" in line or "differs" in line
    ]
    assert [row[0].strip() for row in rows] == ["0", "1", "2", "11*", "17", "18", "19"]
    assert rows[3][1].strip() == "1"
    assert "FAIL" in text


def test_the_command_prints_tables_and_a_last_line(capsys):
    assert run(Settings(steps=4, batch=2, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "PASS: 3 comparisons within the error rule"
    assert any("eager against full, 4 steps" in line for line in lines)


def test_json_has_every_step(capsys):
    settings = Settings(steps=5, batch=3, prompt="ROMEO:", seed=2, device="cpu")
    assert run(settings, as_json=True)
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert output.err.startswith("PASS")
    assert found["passed"] is True and found["settings"]["prompt"] == "ROMEO:"
    assert [c["ours"] for c in found["comparisons"]] == ["full", "eager", "eager"]
    for comparison in found["comparisons"]:
        places = [(s["step"], s["row"]) for s in comparison["steps"]]
        assert places == [(step, row) for step in range(5) for row in range(3)]
        assert all(len(s["top"]) == len(s["reference_top"]) == 3 for s in comparison["steps"])
        assert comparison["max_abs"] == max(s["max_abs"] for s in comparison["steps"])


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_found_before_an_error_is_shown(monkeypatch, capsys, as_json):
    def compare(settings):
        yield [Comparison("float32", "full", "float64", 1e-7, 1e-8, LIMIT)]
        raise InputError("no room")

    monkeypatch.setattr(validation, "compare", compare)
    with pytest.raises(InputError, match="no room"):
        run(Settings(device="cpu"), as_json=as_json)
    output = capsys.readouterr()
    if as_json:
        found = json.loads(output.out)
        assert found["passed"] is None and found["comparisons"][0]["passed"]
    else:
        assert "full" in output.out
    assert "PASS" not in output.out + output.err


def test_the_command_validates_batch_invariant_models(monkeypatch):
    seen, real = [], validation.validate

    def watched(model, *given, **options):
        seen.append(model.batch_invariant)
        return real(model, *given, **options)

    monkeypatch.setattr(validation, "validate", watched)
    assert run(Settings(steps=4, device="cpu", batch_invariant=True))
    assert run(Settings(steps=4, device="cpu"))
    assert seen == [True, False]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"dtype": "bf16"}, "float32 only, not in bfloat16"),
        ({"path": ("warp",)}, "decode path 'warp'"),
        ({"path": ("graph",)}, "Graphs need a GPU"),
        ({"prompt": "word " * 2000}, "tokens, the context 512"),
        ({"steps": 513}, "at most 512 steps"),
        ({"prompt": "ROMEO:", "steps": 512}, "exceed the context"),
        ({"against": "llama"}, "unknown reference 'llama'"),
        ({"reference": "folder"}, "--against hf"),
        ({"model": "no such"}, "no such"),
    ],
)
def test_the_command_refuses(options, words):
    with pytest.raises(Gpt2CupyError, match=words):
        run(Settings(**{"device": "cpu", "steps": 2, **options}))


def command_line(*arguments):
    code = "from gpt2cupy.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "validate", "--device", "cpu", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_exit_codes(tmp_path):
    good = command_line("--steps", "3", "--json")
    assert good.returncode == 0 and json.loads(good.stdout)["passed"]
    wrong = command_line("--steps", "3", "--dtype", "float8")
    assert wrong.returncode == 2 and "unknown dtype" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    # Weights so large that float32 overflows: not what the checkpoint says, so a failure.
    weights = Weights.random(TINY, 0)
    weights.fc_w[...] *= 1e30
    weights.out_w[...] *= 1e30
    write_checkpoint(tmp_path, TINY, weights=weights)
    failed = command_line(str(tmp_path), "--steps", "3")
    assert failed.returncode == 1 and failed.stdout.splitlines()[-1].startswith("FAIL")


def test_a_comparison_without_steps_is_drawn():
    text = drawn([Comparison("float32", "layer 0", "hf float64", 1e-7, 1e-8, LIMIT)])
    assert "layer 0" in text and "pass" in text


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_the_124m_shape_passes_on_a_gpu(dtype_name, outliers):
    import cupy

    weights = Weights.random(GPT2_SHAPE, 0, DTYPES[dtype_name])
    if outliers:
        with_outliers(GPT2_SHAPE, weights)
    model = model_on(cupy, GPT2_SHAPE, weights)
    for batch, prefilled in ((1, 0), (2, 7)):
        ids = random_ids(model, batch, 32, batch)
        found = validate(model, ids, prefilled=prefilled, weights=weights)
        for c in found:
            print(f"{c.dtype} {c.ours} / {c.against}: {c.max_abs:.3e}, at most {c.limit.max:.3e}")
        assert not failures(found)
        assert {c.ours for c in found} == {"full", *decode.usable(model, batch)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype_name", ["float32", "float16"])  # bfloat16's own error hides it
def test_a_changed_element_fails_on_a_gpu(dtype_name):
    import cupy

    weights = Weights.random(GPT2_SHAPE, 0, DTYPES[dtype_name])
    changed = copied(GPT2_SHAPE, weights)
    changed.fc_w[6, 100, 50] += 1
    model = model_on(cupy, GPT2_SHAPE, changed)
    assert failures(validate(model, random_ids(model, 1, 8), weights=weights))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command_to_a_full_disk(options):
    words = [sys.executable, "-m", "gpt2cupy", "validate", "--device", "cpu", "--steps", "3"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*words, *options], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "the output cannot be written: No space left" in ended.stderr
