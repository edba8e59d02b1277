"""batch_invariant=True: the bits of a sequence, whatever runs beside it and however it is cut."""

from __future__ import annotations

import numpy as np
import pytest
from builders import TINY, host, model_on
from error_rule import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2cupy
from gpt2cupy import GPT2, GPT2Config, SamplingParams, ops
from gpt2cupy.decode import PromptRunner, usable
from gpt2cupy.errors import InputError
from gpt2cupy.generation import running
from gpt2cupy.generation.engine import Engine, Request
from gpt2cupy.ops import cached_attention
from gpt2cupy.ops import linear_kernels as product
from gpt2cupy.ops.core import registry
from gpt2cupy.weights import Weights

MODELS = {
    "tiny": TINY,
    # Head sizes and products that the tensor cores cannot take.
    "odd": GPT2Config(
        vocab_size=211, n_positions=300, n_embd=57, n_layer=2, n_head=3, n_inner=99, eos_token_id=0
    ),
    # Two layers of 124M: products shared out among blocks, several tiles of keys.
    "wide": GPT2Config(vocab_size=5000, n_positions=300, n_embd=768, n_layer=2, n_head=12),
}


def invariant(xp, config, dtype=np.float32):
    plain = model_on(xp, config, Weights.random(config, 0, dtype))
    return GPT2(config, plain.weights, batch_invariant=True)


# -- the engine ----------------------------------------------------------------------------------

KINDS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
    {"repetition_penalty": 1.3, "presence_penalty": 0.2},
    {"logit_bias": {3: 2.0, 5: -1.0}},
    {"logprobs": 20},
)


@st.composite
def requests(draw, key):
    ids = draw(st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=30))
    params = SamplingParams(
        max_new_tokens=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 99)),
        **draw(st.sampled_from(KINDS)),
    )
    return Request(key, np.array(ids, np.int32), params)


def said(model, slots, wanted, key, path="auto"):
    """What the engine hands out for one of the requests."""
    found = [t for t in Engine(model, slots, decode=path).run(wanted) if t.key == key]
    return [(t.id, t.logprob, t.finish_reason, t.top) for t in found]


def check_neighbours(model, data):
    watched = data.draw(requests("watched"))
    others = [data.draw(requests(i)) for i in range(data.draw(st.integers(0, 6)))]
    place, slots = data.draw(st.integers(0, len(others))), data.draw(st.integers(1, 6))
    rows, path = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([*usable(model, slots)]))
    alone = said(model, 1, [watched], "watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "PREFILL_ROWS", rows)
        wanted = [*others[:place], watched, *others[place:]]
        beside = said(model, slots, wanted, "watched", path)
    assert beside == alone


NUMPY_MODEL = invariant(np, TINY)


@given(st.data())
@settings(max_examples=60)
def test_a_request_gets_the_same_bits_beside_any_others(data):
    check_neighbours(NUMPY_MODEL, data)


@pytest.mark.gpu
@settings(max_examples=40)
@given(st.data(), st.sampled_from(sorted(DTYPES)))
def test_a_request_gets_the_same_bits_beside_any_others_on_a_gpu(data, name):
    import cupy

    if name not in GPU_MODELS:
        GPU_MODELS[name] = invariant(cupy, TINY, DTYPES[name])
    check_neighbours(GPU_MODELS[name], data)


GPU_MODELS: dict[str, GPT2] = {}


# -- the forward pass ----------------------------------------------------------------------------


def logits_of(model, prompts, watched, cuts, steps=4):
    """Logits [steps + 1, Vp] of prompt ``watched``: after it, and after each of some steps.

    Every prompt is cut at ``cuts``; pieces of all are packed together.
    """
    xp, batch = model.xp, len(prompts)
    cache = model.new_cache(batch)
    runner = PromptRunner(model, cache, model.new_workspace(1024))
    logits = xp.empty((batch, model.config.padded_vocab_size), np.float32)
    found = []
    for begin, end in zip([0, *cuts], [*cuts, None], strict=True):
        pieces = {slot: ids[begin:end] for slot, ids in enumerate(prompts) if len(ids) > begin}
        x = runner.run(list(pieces.values()), list(pieces))
        if watched in pieces:
            place = list(pieces).index(watched)
            row = xp.array(x[place : place + 1])
    model.logits(row, model.new_workspace(1), logits[:1])
    found.append(host(logits)[0].copy())
    slots, work = xp.arange(batch, dtype=np.int32), model.new_workspace(batch)
    for step in range(steps):
        ids = xp.asarray(np.array([prompt[step % len(prompt)] for prompt in prompts], np.int32))
        at = xp.asarray(np.array([len(prompt) + step for prompt in prompts], np.int32))
        model.decode(ids, at, slots, cache, work, logits)
        found.append(host(logits)[watched].copy())
    return np.stack(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [3, 17, 70])
def test_logits_have_the_same_bits_in_any_batch(xp, dtype, name, batch):
    config = MODELS[name]
    model, rng = invariant(xp, config, dtype), np.random.default_rng(batch)
    longest = min(config.n_positions - 4, 150)
    lengths = [longest, *rng.integers(1, 12, batch - 1)]
    prompts = [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in lengths]
    alone = logits_of(model, prompts[:1], 0, [])
    assert np.isfinite(alone).all() and len(np.unique(alone)) > 100
    every = ([], [1], [7, 13, 40], [longest // 2, longest - 1])
    for cuts in every if xp is not np else every[::2]:
        place = int(rng.integers(batch))
        order = [*prompts[1 : place + 1], prompts[0], *prompts[place + 1 :]]
        np.testing.assert_array_equal(logits_of(model, order, place, cuts), alone, str(cuts))


def test_a_forward_pass_gives_each_row_the_same_bits(xp, dtype):
    model = invariant(xp, TINY, dtype)
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (5, 33))
    whole = host(model(ids))
    for row in range(5):
        np.testing.assert_array_equal(host(model(ids[row : row + 1]))[0], whole[row])
        np.testing.assert_array_equal(host(model(ids[row : row + 1, :20]))[0], whole[row, :20])


# -- each op -------------------------------------------------------------------------------------

ROWS = 130
PARTS = [
    (0, 1),
    (1, 2),
    (0, 2),
    (5, 8),
    (2, 9),
    (0, 9),
    (3, 19),
    (0, 17),
    (9, 73),
    (1, 66),
    (0, 64),
]


def parts():
    """Every row by itself, and others from different places."""
    return [(i, i + 1) for i in range(ROWS)] + PARTS


def normal(rng, shape, dtype):
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


@pytest.mark.parametrize(
    ("m", "k"), [(1, 8), (19, 99), (67, 200), (768, 768), (768, 3072), (2304, 768), (9000, 64)]
)
@pytest.mark.parametrize("wide_out", [False, True])
def test_a_product_sums_each_row_alike(xp, dtype, m, k, wide_out):
    rng, out = np.random.default_rng(0), np.dtype(np.float32) if wide_out else dtype
    x, weight = normal(rng, (ROWS, k), dtype), normal(rng, (m, k), dtype)
    bias, residual = normal(rng, m, out), normal(rng, (ROWS, m), out)
    weight, bias = xp.asarray(weight), xp.asarray(bias)
    options = {"activation": "gelu_tanh", "backend": "invariant"}

    def product(begin, end):
        before = xp.array(residual[begin:end])
        given = xp.array(x[begin:end])
        return host(ops.linear(given, weight, bias, residual=before, out=before, **options))

    whole = product(0, ROWS)
    for begin, end in parts():
        np.testing.assert_array_equal(product(begin, end), whole[begin:end], f"{begin}:{end}")


@pytest.mark.parametrize("channels", [19, 768, 1600, 2052])
def test_a_norm_sums_each_row_alike(xp, dtype, channels):
    rng = np.random.default_rng(0)
    x = normal(rng, (ROWS, channels), np.float32)
    weight, bias = (xp.asarray(normal(rng, channels, dtype)) for _ in range(2))
    head = xp.asarray(normal(rng, (40, channels), dtype))

    def normed(begin, end):
        rows = xp.array(x[begin:end])
        options = {"backend": "invariant"}
        together = ops.norm_linear(rows, weight, bias, 1e-5, head, **options)
        return host(ops.layer_norm(rows, weight, bias)), host(together)

    whole = normed(0, ROWS)
    for begin, end in parts():
        for found, expected in zip(normed(begin, end), whole, strict=True):
            np.testing.assert_array_equal(found, expected[begin:end], f"{begin}:{end}")


@pytest.mark.parametrize(("heads", "head_size"), [(12, 64), (2, 16), (3, 19), (2, 128)])
def test_decode_attention_sums_each_row_alike(xp, dtype, heads, head_size):
    capacity, rng = 600, np.random.default_rng(0)
    positions = [0, 1, 31, 32, 63, 64, 65, 255, 256, 599, *rng.integers(0, 600, 60)]
    count = len(positions)
    qkv = normal(rng, (count, 3 * heads * head_size), dtype)
    k, v = (xp.asarray(normal(rng, (count, heads, capacity, head_size), dtype)) for _ in range(2))

    def attended(rows):
        at = [np.array(a, np.int32) for a in (rows, [positions[row] for row in rows])]
        given = (xp.array(qkv[rows]), k, v, *map(xp.asarray, at), 0.125)
        return host(ops.attention_decode(*given, batch_invariant=True))

    whole = attended(list(range(count)))
    for rows in [*([row] for row in range(count)), [4, 2, 9], list(range(17, 0, -1))]:
        np.testing.assert_array_equal(attended(rows), whole[rows], str(rows))


@pytest.mark.parametrize(("heads", "head_size"), [(12, 64), (2, 16), (3, 19), (2, 128)])
def test_prompt_attention_sums_each_token_alike(xp, dtype, heads, head_size):
    length, capacity, rng = 150, 160, np.random.default_rng(0)
    own = normal(rng, (length, 3 * heads * head_size), dtype)
    other = normal(rng, (70, 3 * heads * head_size), dtype)

    def attended(cuts, before):
        """The tokens cut into pieces, behind so many of another sequence each time."""
        k, v = (xp.zeros((2, heads, capacity, head_size), dtype) for _ in range(2))
        found = []
        for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
            packed = xp.asarray(np.concatenate([other[:before], own[begin:end]]))
            starts, past = np.array([0, before, len(packed)]), np.array([0, begin])
            rows = [xp.asarray(a.astype(np.int32)) for a in (starts, np.array([1, 0]), past)]
            longest = max(before, end - begin)
            out = ops.attention_prefill(packed, k, v, *rows, longest, 0.125, batch_invariant=True)
            found.append(host(out)[before:])
        return np.concatenate(found)

    whole = attended([], 0)
    for cuts in ([1], [149], [63], [64], [65, 66], [16, 48, 100], list(range(1, 150, 9))):
        for before in (0, 1, 70):
            np.testing.assert_array_equal(attended(cuts, before), whole, f"{cuts} {before}")


# -- which kernels: as launched on chips that are not here ----------------------------------------

CHIPS = {"sm_75": (False, False), "sm_80": (True, False), "sm_90": (True, True)}


@pytest.fixture
def launches(monkeypatch):
    """What is launched for NumPy's arrays, taken for a GPU's: (entry, grid)."""
    seen = []

    def launch(kernel, grid, block, args, **options):
        seen.append((kernel.entry, grid))

    monkeypatch.setattr(registry, "_device_types", {np.ndarray})
    for module in (product, cached_attention):
        monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(module, "sm_count", lambda: 132)
    monkeypatch.setattr(product, "shared_limit", lambda: 227 << 10)
    return seen


def pretend(monkeypatch, chip):
    for module in (product, cached_attention):
        for name, value in zip(("has_mma", "has_clusters"), CHIPS[chip], strict=True):
            monkeypatch.setattr(module, name, lambda value=value: value)


@pytest.mark.parametrize(
    ("chip", "dtype", "m", "k", "entry", "blocks"),
    [
        ("sm_90", "float16", 2304, 768, "linear_rows_c4", (144, 64)),
        ("sm_90", "float16", 768, 3072, "linear_rows_c8", (96, 64)),
        ("sm_90", "float16", 50304, 768, "linear_rows_c1", (786, 64)),
        ("sm_90", "float16", 96, 99, "linear_fixed", (12, 8)),
        ("sm_90", "float32", 768, 768, "linear_fixed_f32", (96, 8)),
        ("sm_80", "float16", 768, 3072, "linear_rows_c1", (12, 64)),
        ("sm_75", "float16", 768, 3072, "linear_fixed", (96, 8)),
    ],
)
def test_any_number_of_rows_has_one_product(
    launches, monkeypatch, chip, dtype, m, k, entry, blocks
):
    pretend(monkeypatch, chip)
    weight = np.empty((m, k), dtype)
    for rows in (1, 2, 16, 17, 64, 65, 500):
        out = np.empty((rows, m), dtype)
        ops.linear(np.empty((rows, k), dtype), weight, out=out, backend="invariant")
        assert launches.pop() == (entry, (blocks[0], -(-rows // blocks[1]))) and not launches


@pytest.mark.parametrize(("chip", "split"), [("sm_75", 1), ("sm_80", 1), ("sm_90", 2)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_any_number_of_rows_has_one_attention(launches, monkeypatch, chip, split, dtype):
    pretend(monkeypatch, chip)
    cache = np.empty((1, 12, 8, 64), dtype)
    mma = "_mma" if dtype == "float16" and chip != "sm_75" else ""
    entry = f"attention_decode{mma}" + (f"_c{split}" if split > 1 else "")
    for rows in (1, 4, 30, 300):
        at, qkv = np.zeros(rows, np.int32), np.empty((rows, 3 * 768), dtype)
        out = np.empty((rows, 768), dtype)
        ops.attention_decode(qkv, cache, cache, at, at, 1.0, out=out, batch_invariant=True)
        assert launches.pop() == (entry, (12 * split, rows)) and not launches


# -- the front door ------------------------------------------------------------------------------


def test_cublas_is_refused():
    weights = NUMPY_MODEL.weights
    with pytest.raises(InputError, match="cuBLAS") as caught:
        GPT2(TINY, weights, gemv="cublas", batch_invariant=True)
    assert caught.value.where == "batch_invariant"
    with pytest.raises(InputError, match="cuBLAS"):
        NUMPY_MODEL.gemv = "cublas"
    assert NUMPY_MODEL.backend == "invariant" and GPT2(TINY, weights).backend == "ours"


def test_the_option_is_a_bool_and_is_shown():
    with pytest.raises(InputError, match="batch_invariant is 'yes'"):
        gpt2cupy.load(batch_invariant="yes", device="cpu")
    with gpt2cupy.load(batch_invariant=True, device="cpu") as lm:
        assert repr(lm) == "<LanguageModel shakespeare, float32 on cpu, batch-invariant>"


def test_one_kernel_chooses_whatever_rows_ask_for():
    for flag in (False, True):
        model = GPT2(TINY, NUMPY_MODEL.weights, batch_invariant=flag)
        assert Engine(model, 2).state.plain is not flag
