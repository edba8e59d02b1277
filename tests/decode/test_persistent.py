"""The persistent step: what it refuses, how "auto" chooses it, and its logits on a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from builders import TINY, model_on, widened, with_outliers
from error_rule import DTYPES, check

from gpt2cupy import GPT2, GPT2Config, SamplingParams, decode
from gpt2cupy.decode import DecodeState, autotune, persistent
from gpt2cupy.errors import InputError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.ops.gpt2 import step
from gpt2cupy.validate import validate
from gpt2cupy.weights import Weights

SMALL = GPT2Config(
    vocab_size=500, n_positions=1030, n_embd=256, n_layer=3, n_head=4, bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip
HALF = [name for name in DTYPES if name != "float32"]


@pytest.fixture
def chip(monkeypatch):
    """A GPU as far as it is asked: its clusters, shared memory and multiprocessors."""
    found = SimpleNamespace(clusters=True, shared=227 << 10, sms=132)
    monkeypatch.setattr(step, "has_clusters", lambda: found.clusters)
    monkeypatch.setattr(step, "shared_limit", lambda: found.shared)
    monkeypatch.setattr(step, "sm_count", lambda: found.sms)
    return found


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"rows": 3}, "rows, not 3"),
        ({"head_size": 80}, "not 80"),
        ({"inner": 1000}, "inner size"),
        ({"channels": 2112, "inner": 8448}, "not 2112"),
        ({"channels": 192, "inner": 768}, "not 192"),
        ({"dtype": np.float32}, "float32"),
        ({"clusters": False}, "compute capability 9.0"),
        ({"shared": 99 << 10}, "shared memory"),
        ({"sms": 11}, "12 multiprocessors"),
        ({"sms": 12}, None),
    ],
)
def test_what_a_step_cannot_take_has_a_reason(chip, changed, reason):
    sizes = {"rows": 2, "channels": 768, "inner": 3072, "head_size": 64, "dtype": np.float16}
    for name, value in changed.items():
        if name in sizes:
            sizes[name] = value
        else:
            setattr(chip, name, value)
    found = step.why_not(**sizes)
    assert found is None if reason is None else reason in found


def test_a_model_on_the_cpu_has_none():
    model = GPT2.random(TINY, 0, device="cpu")
    assert list(decode.usable(model, 1)) == ["eager"]
    with pytest.raises(InputError, match="persistent"):
        decode.decoder(model, "persistent", 1)


def a_model(**changed):
    wte = SimpleNamespace(device=contextlib.nullcontext())
    found = {"xp": SimpleNamespace(), "batch_invariant": False, "gemv": "ours", "config": SMALL}
    found |= {"dtype": np.dtype(np.float16), "weights": SimpleNamespace(wte=wte)}
    return SimpleNamespace(**(found | changed))


@pytest.mark.parametrize(
    "changed", [{"batch_invariant": True}, {"gemv": "cublas"}, {"dtype": np.dtype(np.float32)}]
)
def test_a_model_that_it_cannot_run_is_refused(chip, changed):
    assert "persistent" in decode.usable(a_model(), 1)
    model = a_model(**changed)
    assert list(decode.usable(model, 1)) == ["eager", "graph"]
    with pytest.raises(InputError, match="no persistent step"):
        decode.decoder(model, "persistent", 1)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The measurements that were made, and what they say."""
    found = SimpleNamespace(times={"graph": 120.0, "persistent": 100.0}, made=[])

    def measure(model, rows, decoders):
        found.made.append((rows, *decoders))
        return dict(found.times)

    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_measure", measure)
    monkeypatch.setattr(autotune, "_key", lambda model, rows, decoders: f"gpu {rows}")
    return found


def test_auto_takes_the_fastest_and_remembers_it(chip, measured, tmp_path):
    for _ in range(2):
        assert decode.decoder(a_model(), "auto", 1).name == "persistent"
    assert measured.made == [(1, "graph", "persistent")]
    measured.times["persistent"] = 130.0
    assert decode.decoder(a_model(), "auto", 2).name == "graph"
    assert list(decode.times(a_model(), 1)) == ["persistent", "graph"]
    (tmp_path / "cache" / "decode-paths.json").write_text("{broken")
    assert decode.decoder(a_model(), "auto", 1).name == "graph"
    assert len(measured.made) == 3


def test_noise_is_no_reason_for_other_bits(chip, measured):
    measured.times["persistent"] = 118.0
    assert decode.decoder(a_model(), "auto", 1).name == "graph"


@pytest.mark.parametrize(
    "kept",
    [
        "{}",
        "[]",
        '"fast"',
        '{"graph": 2.0, "persistent": 1.0}',
        '{"us": {"warp": 1.0}, "sources": {}}',
        '{"us": {"graph": null, "persistent": 1.0}, "sources": {}}',
        '{"us": {"graph": 1.0, "persistent": 2.0}, "sources": []}',
        '{"us": {"graph": 1.0, "persistent": 2.0}, "sources": {"no_more.cu": {}}}',
        '{"us": {"graph": 1.0, "persistent": 2.0}, "sources": {"norm.cu": {"norm.cu": "0"}}}',
    ],
)
def test_what_is_kept_is_not_trusted(chip, measured, tmp_path, kept):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "decode-paths.json").write_text(f'{{"gpu 1": {kept}}}')
    assert decode.decoder(a_model(), "auto", 1).name == "persistent"
    assert len(measured.made) == 1


def test_a_choice_that_cannot_be_kept_is_made(chip, measured, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(file / "below"))
    assert decode.decoder(a_model(), "auto", 1).name == "persistent"


def test_auto_is_a_graph_where_there_is_no_choice(chip, measured):
    assert decode.decoder(a_model(), "auto", 3).name == "graph"
    assert decode.decoder(a_model(), "auto").name == "graph"
    assert measured.made == []


def on_gpu(weights, rows=1, config=SMALL):
    cupy = pytest.importorskip("cupy")
    model = model_on(cupy, config, weights)
    if reason := persistent.why_not(model, rows):
        pytest.skip(reason)
    return model


def against_numpy(dtype_name, rows, channels, first=40, together=False):
    """From a cache of random keys and values; each row has a position of its own.

    ``together``: all in one slot, as drafts of a text are.
    """
    cupy, dtype, heads = pytest.importorskip("cupy"), DTYPES[dtype_name], channels // 64
    size = 64 if first < 60 else 640
    config = GPT2Config(vocab_size=130, n_positions=size, n_embd=channels, n_layer=2, n_head=heads)
    if reason := step.why_not(rows, channels, 4 * channels, 64, dtype):
        pytest.skip(reason)
    host, rng = Weights.random(config, rows, dtype), np.random.default_rng(rows)
    arrays = {name: cupy.asarray(array) for name, array in host.items()}
    arrays["lm_head"] = arrays["wte"]
    ids = rng.integers(0, config.vocab_size, rows).astype(np.int32)
    positions = np.arange(first, first + rows, dtype=np.int32)
    slots = np.zeros(rows, np.int32) if together else np.arange(rows, dtype=np.int32)
    past = (rng.standard_normal((2, 2, rows, heads, size, 64)) * 0.5).astype(dtype)
    if together:  # what the rows before a row write is not read from the cache
        past[:, :, 0, :, first:] = np.nan

    def by_numpy(weights, keys_and_values):
        model = GPT2(config, weights)
        cache, work = model.new_cache(rows), model.new_workspace(rows)
        cache.k[...], cache.v[...] = keys_and_values
        logits = np.zeros((rows, config.padded_vocab_size), work.x.dtype)
        return model.decode(ids, positions, slots, cache, work, logits), cache

    baseline, cache = by_numpy(host, past)  # rounds what every op gives
    exact, exact_cache = by_numpy(widened(config, host), past.astype(np.float64))
    k, v = (cupy.asarray(each) for each in past)
    out = cupy.zeros(baseline.shape, np.float32)
    step.decode_step(
        *(cupy.asarray(each) for each in (ids, positions, slots)),
        arrays,
        k,
        v,
        cupy.zeros(step.mailboxes_size(rows, channels), np.uint8),
        scale=config.attention_scale(0),
        by_layer=False,
        eps=config.layer_norm_epsilon,
        activation=config.activation,
        out=out,
        together=together,
    )
    check(out.get(), baseline, exact, dtype, "logits")
    new = np.s_[:, slots, :, positions]
    for name, own, before in (("k", k.get(), past[0]), ("v", v.get(), past[1])):
        caches = (getattr(cache, name)[new], getattr(exact_cache, name)[new])
        check(own[new], *caches, dtype, f"new {name}")
        own[new] = before[new]
        np.testing.assert_array_equal(own.view(np.uint16), before.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", step.ROWS)
@pytest.mark.parametrize("dtype_name", HALF)
def test_one_launch_is_the_step_of_the_ops(dtype_name, rows):
    against_numpy(dtype_name, rows, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("dtype_name", HALF)
@pytest.mark.parametrize("first", [0, 13, 15, 40, 126, 254, 257, 300, 600])
def test_rows_of_one_text_see_each_other(first, dtype_name, rows):
    """Across tiles of 16 keys, and across the parts that blocks have of a head."""
    against_numpy(dtype_name, rows, 256, first, together=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", step.ROWS)
@pytest.mark.parametrize(("channels", "grid"), [(320, None), (832, None), (256, 4), (832, 16)])
def test_any_share_of_a_block(monkeypatch, channels, grid, rows):
    """Rings that go round, parts of K that differ, several turns of outputs, several heads."""
    if grid:
        monkeypatch.setattr(step, "blocks", lambda channels: grid)
    against_numpy("float16", rows, channels)


@pytest.mark.gpu
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("rows", step.ROWS)
@pytest.mark.parametrize("dtype_name", HALF)
def test_its_logits_obey_the_error_rule(dtype_name, rows, outliers):
    weights = Weights.random(SMALL, rows, DTYPES[dtype_name])
    if outliers:
        with_outliers(SMALL, weights)
    model = on_gpu(weights, rows)
    ids = np.random.default_rng(rows).integers(0, SMALL.vocab_size, (rows, 12)).astype(np.int32)
    found = validate(model, ids, weights=weights)
    assert "persistent" in {c.ours for c in found} and all(c.passed for c in found)


@pytest.mark.gpu
@pytest.mark.parametrize("context", [1, 2, 31, 32, 33, 255, 256, 257, 1023, 1024])
@pytest.mark.parametrize("dtype_name", HALF)
def test_any_context(dtype_name, context):
    """Also of two rows, each with a length of its own."""
    weights = Weights.random(SMALL, context, DTYPES[dtype_name])
    for rows in (1, 2):
        model = on_gpu(weights, rows)
        ids = np.random.default_rng(context).integers(0, SMALL.vocab_size, (rows, context + 1))
        found = validate(model, ids.astype(np.int32), prefilled=context, weights=weights)
        assert all(c.passed for c in found)


def a_state(model, rows, position, fill=0.0):
    """A state whose cache is random up to the positions and ``fill`` from there on."""
    xp, rng = model.xp, np.random.default_rng(7)
    cache = model.new_cache(rows, 300)
    for array in (cache.k, cache.v):
        values = rng.standard_normal(array.shape) * 0.5
        values[:, :, :, position:] = fill
        array[...] = xp.asarray(values).astype(array.dtype)
    state = DecodeState(model, cache, rows)
    params = SamplingParams(temperature=0).row(0, 0, -1)
    for row in range(rows):
        state.assign(row, row, params)
        state.seek(row, position)
    state.ids[...] = xp.asarray(rng.integers(0, SMALL.vocab_size, rows).astype(np.int32))
    return state


def steps(model, state, count=4, epoch=None):
    """The logits of some steps."""
    decoder = decode.decoder(model, "persistent")
    decoder.prepare(state)
    if epoch is not None:
        state.mailboxes[:4].view(np.uint32)[...] = epoch
    found = []
    for _ in range(count):
        decoder.step(state)
        found.append(state.logits.get())
    return np.array(found)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", step.ROWS)
def test_every_run_gives_the_same_bits(rows):
    model = on_gpu(Weights.random(SMALL, 0, np.float16), rows)
    expected = steps(model, a_state(model, rows, 200))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(expected, steps(model, a_state(model, rows, 200)))
    # What lies beyond a position is not read, and how often steps were made does not matter: the
    # number of a turn has 16 bits in some words.
    np.testing.assert_array_equal(expected, steps(model, a_state(model, rows, 200, np.nan)))
    for epoch in (2**16 - 4, 2**32 - 5):
        np.testing.assert_array_equal(
            expected, steps(model, a_state(model, rows, 200), epoch=epoch)
        )


@pytest.mark.gpu
def test_an_idle_row_changes_nothing():
    model = on_gpu(Weights.random(SMALL, 0, np.float16), 2)
    state = a_state(model, 2, 100)
    expected = steps(model, a_state(model, 2, 100), 1)
    state.slots[1] = -1
    before = state.cache.k[:, 1].get()
    found = steps(model, state, 1)
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    np.testing.assert_array_equal(state.cache.k[:, 1].get(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 9}])
def test_an_engine_writes_the_same_text(options):
    model = on_gpu(Weights.random(SMALL, 0, np.float16))
    params = SamplingParams(max_new_tokens=30, seed=3, eos_token_id=-1, **options)
    found = []
    for path in ("eager", "persistent"):
        requests = [Request(i, np.arange(i + 1, dtype=np.int32), params) for i in range(2)]
        tokens = list(Engine(model, 1, decode=path).run(requests))
        found.append([(t.key, t.id) for t in tokens])
    assert found[0] == found[1]


@pytest.mark.gpu
def test_a_choice_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path))
    model = on_gpu(Weights.random(SMALL, 0, np.float16))
    found = decode.times(model, 1)
    assert sorted(found) == ["graph", "persistent"] and all(us > 0 for us in found.values())
    monkeypatch.setattr(autotune, "_measure", lambda *_: pytest.fail("measured again"))
    assert decode.times(model, 1) == found
    assert Engine(model, 1).decoder.name == next(iter(found))
