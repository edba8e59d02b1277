"""The whole model: step by step equals at once, nothing unused is read, the same bits twice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import TINY, host, model_on, widened, with_outliers, write_checkpoint
from error_rule import DTYPES, check

import gpt2cupy
from gpt2cupy import GPT2, GPT2Config, SamplingParams
from gpt2cupy.decode import PromptRunner
from gpt2cupy.errors import InputError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.weights import Weights


def stepwise(model, ids, poison=True):
    """Logits [T, V] of one sequence, one decode step per token, the cache's rest poisoned."""
    xp, config = model.xp, model.config
    cache = model.new_cache(1)
    if poison:
        cache.k[...], cache.v[...] = xp.nan, xp.nan
    work = model.new_workspace(1)
    logits = xp.empty((1, config.padded_vocab_size), work.x.dtype)
    slots = xp.zeros(1, np.int32)
    rows = []
    for position, token in enumerate(ids):
        at = [xp.asarray(np.array([value], np.int32)) for value in (token, position)]
        model.decode(*at, slots, cache, work, logits)
        rows.append(host(logits)[0, : config.vocab_size].copy())
    return np.stack(rows)


def test_step_by_step_equals_at_once_and_reads_nothing_unused(xp):
    weights = Weights.random(TINY, 0)
    model = model_on(xp, TINY, weights)
    oracle = GPT2(TINY, widened(TINY, weights))
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, 40)
    exact = oracle(ids[None])[0]
    at_once = host(model(ids[None])[0])
    check(stepwise(model, ids), at_once, exact, np.dtype(np.float32), "stepwise")
    np.testing.assert_array_equal(stepwise(model, ids), stepwise(model, ids, poison=False))
    np.testing.assert_array_equal(at_once, host(model(ids[None])[0]))


def test_prefill_in_pieces_and_ragged_equals_each_alone(xp):
    model = model_on(xp, TINY, Weights.random(TINY, 0))
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, TINY.vocab_size, n) for n in (20, 9))
    cache, work = model.new_cache(2), model.new_workspace(29)
    model.prefill([first[:13], second], [1, 0], cache, work)
    x, starts = model.prefill([first[13:]], [1], cache, work)
    assert starts.tolist() == [0, 7] and cache.lengths.tolist() == [9, 20]
    together = host(x)
    alone = host(model.hidden(first[None]))[0, 13:]
    np.testing.assert_allclose(together, alone, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 5), (3, 40)])
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_hidden_states_obey_the_error_rule(xp, dtype_name, batch, length):
    dtype = np.dtype(np.float32) if xp is np else DTYPES[dtype_name]
    weights = Weights.random(TINY, 0, dtype)
    model = model_on(xp, TINY, weights)
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (batch, length))
    found = host(model.hidden_states(ids))
    assert found.dtype == np.float32
    exact = GPT2(TINY, widened(TINY, weights)).hidden_states(ids)
    assert found.shape == exact.shape == (TINY.n_layer + 1, batch, length, TINY.n_embd)
    assert exact.dtype == np.float64
    baseline = GPT2(TINY, weights).hidden_states(ids)
    for layer in range(len(exact)):
        check(found[layer], baseline[layer], exact[layer], dtype, f"hidden state {layer}")
    # The last one is what the logits are made of, the one before the last layer's input.
    logits = found[-1] @ host(model.weights.lm_head)[: TINY.vocab_size].astype(np.float32).T
    np.testing.assert_allclose(logits, host(model(ids)), atol=0.02 * np.abs(logits).max())
    first = host(model.weights.wte)[ids].astype(np.float32)
    np.testing.assert_array_equal(
        found[0], first + host(model.weights.wpe)[:length].astype(np.float32)
    )


def test_hidden_states_refuse_what_the_model_cannot_take(xp):
    model = model_on(xp, TINY, Weights.random(TINY, 0))
    for ids in ([[TINY.vocab_size]], [[0] * (TINY.n_positions + 1)], [[0.5]]):
        with pytest.raises(InputError):
            model.hidden_states(ids)


def requests(config, count, **options):
    rng = np.random.default_rng(3)
    params = SamplingParams(max_new_tokens=12, seed=1, **options)
    return [
        Request(i, rng.integers(0, config.vocab_size, 3 + 5 * i).astype(np.int32), params)
        for i in range(count)
    ]


def texts(engine, wanted):
    found = {request.key: [] for request in wanted}
    for token in engine.run(wanted):
        found[token.key].append(token.id)
    return found


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20}])
def test_the_engine_gives_each_request_what_it_gets_alone(xp, options):
    model = model_on(xp, TINY, Weights.random(TINY, 0))
    wanted = requests(TINY, 5, **options)
    together = texts(Engine(model, 2), wanted)
    for request in wanted:
        assert together[request.key] == texts(Engine(model, 1), [request])[request.key]
        assert len(together[request.key]) == 12
    assert together == texts(Engine(model, 2), wanted)


def test_generation_goes_to_the_last_position_and_stops(xp):
    model = model_on(xp, TINY, Weights.random(TINY, 0))
    prompt = np.arange(TINY.n_positions, dtype=np.int32)
    for length in (1, TINY.n_positions - 1, TINY.n_positions):
        request = Request(0, prompt[:length], SamplingParams(max_new_tokens=None))
        tokens = list(Engine(model, 1).run([request]))
        assert len(tokens) == TINY.n_positions - length + 1
        assert tokens[-1].finish_reason == "length"


def test_greedy_generation_is_the_argmax_of_the_full_forward(xp):
    model = model_on(xp, TINY, Weights.random(TINY, 1))
    (request,) = requests(TINY, 1)
    tokens = texts(Engine(model, 1), [request])[0]
    ids = list(request.prompt)
    for token in tokens:
        assert token == int(host(model(np.array([ids])))[0, -1].argmax())
        ids.append(token)


def test_a_dropped_request_frees_its_slot(xp):
    model = model_on(xp, TINY, Weights.random(TINY, 0))
    engine = Engine(model, 1)
    wanted = requests(TINY, 2)
    seen = []
    for token in engine.run(wanted):
        seen.append(token.key)
        if token.key == 0 and seen.count(0) == 3:
            engine.cancel(0)
    assert seen == [0] * 3 + [1] * 12
    assert engine.cache.lengths.tolist() == [0]


@pytest.mark.parametrize("stored", DTYPES)
def test_a_checkpoint_on_disk_gives_the_same_logits_as_its_arrays(tmp_path, xp, stored):
    dtype = DTYPES[stored]
    weights = write_checkpoint(tmp_path, TINY, 0, dtype)
    device = "cpu" if xp is np else "cuda"
    loaded = GPT2.from_pretrained(str(tmp_path), device=device)
    assert loaded.dtype == (np.float32 if xp is np else dtype)
    ids = np.arange(10)[None]
    # A checkpoint stores every bias in its dtype; ours keeps two kinds in float32.
    rounded = dataclasses.replace(weights)
    for name in ("proj_b", "out_b"):
        getattr(rounded, name)[...] = getattr(weights, name).astype(dtype)
    held = rounded if xp is not np else widened(TINY, rounded)
    direct = GPT2(TINY, held) if xp is np else model_on(xp, TINY, held)
    np.testing.assert_allclose(host(loaded(ids)), host(direct(ids)), atol=3e-6)


def test_weights_take_little_more_than_their_bytes():
    for name in ("gpt2", "gpt2-xl"):
        config = GPT2Config.from_name(name)
        from gpt2cupy.weights import RESIDUAL_BIASES, weight_shapes

        shapes = weight_shapes(config) | {"wte": (config.vocab_size, config.n_embd)}
        bare = sum(int(np.prod(shape)) for shape in shapes.values()) * 2
        extra = sum(int(np.prod(shapes[n])) for n in RESIDUAL_BIASES) * 2
        padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd * 2
        assert bare + extra + padding + 256 * len(shapes) <= 1.02 * bare


GPT2_SHAPE = GPT2Config.from_name("gpt2")


@pytest.mark.gpu
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_124m_logits_obey_the_error_rule(tmp_path, dtype_name, outliers):
    """Prefill and decode of the 124M shape against float64, beside PyTorch on the same GPU."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import cupy

    dtype = DTYPES[dtype_name]
    for seed in range(5):
        weights = Weights.random(GPT2_SHAPE, seed, dtype)
        if outliers:
            with_outliers(GPT2_SHAPE, weights)
        write_checkpoint(tmp_path, GPT2_SHAPE, dtype=dtype, weights=weights)
        for name in ("proj_b", "out_b"):  # as the checkpoint stores them
            array = getattr(weights, name)
            array[...] = array.astype(dtype)
        ids = np.random.default_rng(seed).integers(0, GPT2_SHAPE.vocab_size, 24)
        exact = GPT2(GPT2_SHAPE, widened(GPT2_SHAPE, weights))(ids[None])[0]
        theirs = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path, dtype=getattr(torch, dtype_name)
        ).to("cuda")
        with torch.no_grad():
            baseline = theirs(torch.tensor(ids[None], device="cuda")).logits[0]
        baseline = baseline.double().cpu().numpy()
        model = model_on(cupy, GPT2_SHAPE, weights)
        check(host(model(ids[None])[0]), baseline, exact, dtype, "prefill")
        check(stepwise(model, ids), baseline, exact, dtype, "decode")


@pytest.mark.gpu
@pytest.mark.parametrize("gemv", ["ours", "cublas"])
def test_both_one_row_products_write_the_same_text(gemv):
    lm = gpt2cupy.load(device="cuda")
    expected = gpt2cupy.load(device="cpu").generate("ROMEO:", max_new_tokens=20).text
    lm.model.gemv = gemv
    assert lm.generate("ROMEO:", max_new_tokens=20).text == expected


@pytest.mark.gpu
def test_memory_is_given_back():
    import cupy

    pool = cupy.get_default_memory_pool()
    with gpt2cupy.load(device="cuda") as lm:
        lm.generate("ROMEO:", max_new_tokens=5)
    pool.free_all_blocks()
    used = pool.used_bytes()
    for _ in range(3):
        with gpt2cupy.load(device="cuda") as lm:
            lm.generate("ROMEO:", max_new_tokens=5)
    assert pool.used_bytes() == used


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 9, "presence_penalty": 0.5}]
)
def test_a_graph_gives_the_bits_of_the_eager_step(slots, options):
    import cupy

    model = model_on(cupy, TINY, Weights.random(TINY, 0, np.float16))
    params = SamplingParams(max_new_tokens=12, seed=3, **options)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, TINY.vocab_size, n).astype(np.int32) for n in (1, 3, 2, 4)]
    found = []
    for path in ("eager", "graph", "graph"):
        engine = Engine(model, slots, decode=path)
        # The same for both.
        engine.running.prompts = PromptRunner(model, engine.cache, engine.prefill_work)
        requests = [Request(i, prompt, params) for i, prompt in enumerate(prompts)]
        found.append(sorted((t.key, t.id, t.logprob) for t in engine.run(requests)))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4 * 12


def test_prompts_give_the_row_of_each_last_token(xp):
    model = model_on(xp, TINY, Weights.random(TINY, 0, np.float32))
    rng, counts, slots = np.random.default_rng(0), (5, 1, 9), [2, 0, 1]
    pieces = [rng.integers(0, TINY.vocab_size, n).astype(np.int32) for n in counts]
    caches, work = [model.new_cache(4) for _ in range(2)], model.new_workspace(20)
    whole, starts = model.prefill(pieces, slots, caches[0], work)
    expected = host(whole)[starts[1:] - 1]
    found = PromptRunner(model, caches[1], work, graphs=False).run(pieces, slots)
    np.testing.assert_allclose(host(found)[:3], expected, rtol=1e-4, atol=1e-5)
    for own, other in zip(*((cache.k, cache.v) for cache in caches), strict=True):
        np.testing.assert_array_equal(host(own), host(other))
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [1, 9, 5, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 3])
def test_prompts_from_a_graph_obey_the_error_rule(slots):
    import cupy

    weights = Weights.random(TINY, 0, np.float16)
    model = model_on(cupy, TINY, weights)
    counts = (1, 7, 8, 9, 15, 8)  # grows the slots, and goes back to a bucket
    ends = np.cumsum(counts)
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (slots, sum(counts)))
    exact = GPT2(TINY, widened(TINY, weights)).hidden(ids)
    found = {}
    for path in ("eager", "graph"):
        engine = Engine(model, slots, decode=path)
        with engine.stream:
            x = [
                host(engine.prompts.run(list(ids[:, end - count : end]), range(slots))[:slots])
                for end, count in zip(ends, counts, strict=True)
            ]
        found[path] = np.stack(x, axis=1)
        assert engine.cache.lengths.tolist() == [sum(counts)] * slots
    exact = exact[:, ends - 1]
    check(found["graph"], found["eager"], exact, np.dtype(np.float16), "prompt graph")


def test_an_unknown_decode_path_is_refused():
    model = GPT2(TINY, Weights.random(TINY, 0))
    with pytest.raises(InputError, match="warp"):
        Engine(model, decode="warp")
    with pytest.raises(InputError, match="graph"):
        Engine(model, decode="graph")


def test_preparing_a_decoder_advances_nothing(xp):
    engine = Engine(model_on(xp, TINY, Weights.random(TINY, 0)), 1)
    with engine.stream:
        engine.decoder.prepare(engine.state)
    assert host(engine.state.steps).tolist() == [0]
    assert host(engine.state.positions).tolist() == [0]
