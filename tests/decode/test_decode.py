"""Decoders and prompt graphs: what is prepared, kept and told apart; mostly without a GPU."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from builders import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cupy import GPT2, SamplingParams, decode
from gpt2cupy.cache import KVCache
from gpt2cupy.decode import (
    Decoder,
    DecodeState,
    PromptRunner,
    captured,
    graph,
    launched,
    prompt,
)
from gpt2cupy.decode import step as step_module
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.ops.core import blas, blas_device
from gpt2cupy.ops.core.tape import recorded, submit
from gpt2cupy.quantize import quantize
from gpt2cupy.workspace import Workspace

DEVICE = SimpleNamespace(zeros=np.zeros, empty=np.empty, asarray=np.asarray)  # stands for CuPy


def spelled(model):
    """A decoder whose step is one call, which writes down the kind of step that was recorded."""
    ran, recorded_for = [], []

    def step(model, state):
        label = (state.plain, model.backend)
        recorded_for.append(state)
        submit(lambda: ran.append(label))

    return Decoder(model, step, launched, "spelled"), ran, recorded_for


def a_model():
    return SimpleNamespace(backend="ours")


def a_state():
    return SimpleNamespace(xp=DEVICE, batch=1, counts=None, bias=None, plain=True)


def test_the_launches_shown_are_those_of_the_step_asked_for():
    (decoder, ran, recorded_for), state = spelled(a_model()), a_state()
    for plain, gemv in [(True, "ours"), (False, "ours"), (True, "cublas"), (True, "ours")] * 2:
        state.plain, decoder.model.backend = plain, gemv
        decoder.prepare(state)
        assert ran == []
        (call,) = decoder.calls
        call()
        assert ran.pop() == (plain, gemv)
        decoder.step(state, 2)
        assert ran == [(plain, gemv)] * 2
        ran.clear()
    assert recorded_for == [state] * 3


def test_several_steps_look_up_once_what_to_run():
    class State(SimpleNamespace):
        asked = 0

        @property
        def plain(self):
            self.asked += 1
            return True

    state = State(xp=DEVICE, batch=1, counts=None, bias=None)
    decoder, ran, recorded_for = spelled(a_model())
    decoder.step(state)  # recorded, which asks too
    asked = state.asked
    decoder.step(state, 5)
    assert state.asked == asked + 1 and len(ran) == 6 and len(recorded_for) == 1


def random_requests(rng, count, capacity):
    """Mixed lengths, so that rows become idle and are given away again at other times."""
    for key in range(count):
        prompt = rng.integers(0, TINY.vocab_size, rng.integers(1, capacity))
        params = SamplingParams(
            max_new_tokens=min(int(rng.integers(1, 12)), capacity + 1 - len(prompt)),
            temperature=float(rng.choice([0.0, 0.9])),
            repetition_penalty=float(rng.choice([1.0, 1.3])),
            seed=key,
            eos_token_id=-1,
        )
        yield Request(key, prompt.astype(np.int32), params)


def rows_of_steps(patch):
    """A list to which each step of a model adds how many rows it computes."""
    rows, decode_rows = [], GPT2.decode

    def counted(self, ids, *rest):
        rows.append(len(ids))
        return decode_rows(self, ids, *rest)

    patch.setattr(GPT2, "decode", counted)
    return rows


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(2, 5))
def test_leaving_idle_rows_out_changes_no_bit_of_the_others(seed, slots):
    """Where the product of a row does not depend on how many there are, as BLAS's may."""
    weights = GPT2.random(TINY, 1, device="cpu").weights
    model, found = GPT2(TINY, weights, batch_invariant=True), []
    run_used_rows = step_module._run_used_rows

    def run_all_rows(model, state):
        model.decode(state.ids, state.positions, state.slots, state.cache, state.work, state.logits)
        step_module.sample_next(state, state.logits, state.rows)

    with pytest.MonkeyPatch.context() as patch:
        rows = rows_of_steps(patch)
        for way in (run_all_rows, run_used_rows):
            patch.setattr(step_module, "_run_used_rows", way)
            rows.clear()
            # A capacity below n_positions: idle rows that were left running stay in the table.
            engine = Engine(model, slots, 24)
            requests = list(random_requests(np.random.default_rng(seed), 2 * slots, 24))
            found.append([(t.key, t.id, t.logprob) for t in engine.run(requests)])
            if way is run_used_rows:
                assert 2 <= min(rows) <= max(rows) <= slots
    assert found[0] == found[1]


def test_a_row_idle_for_longer_than_the_context_stops_nothing(monkeypatch):
    rows = rows_of_steps(monkeypatch)
    engine = Engine(GPT2.random(TINY, 0, device="cpu"), 3)
    length = TINY.n_positions
    prompts = np.arange(length - 2, dtype=np.int32), np.arange(2, dtype=np.int32)
    params = SamplingParams(max_new_tokens=None, eos_token_id=-1)
    tokens = list(engine.run(Request(i, prompt, params) for i, prompt in enumerate(prompts)))
    assert [sum(t.key == i for t in tokens) for i in range(2)] == [3, length - 1]
    assert set(rows) == {2}, "neither the third row nor, later, the first"


def test_a_step_of_idle_rows_alone_is_counted_and_nothing_else():
    state = DecodeState(model := GPT2.random(TINY, 0, device="cpu"), model.new_cache(2), 2)
    decode.decoder(model).step(state, 3)
    assert state.steps.tolist() == [3, 3] and state.positions.tolist() == [0, 0]
    assert not state.logits.any()


def test_prompt_graphs_are_kept_by_rows_and_backend(monkeypatch):
    """A graph captured with one product must not run for a model that was given the other."""

    class Model:
        xp, backend, config, dtype = DEVICE, "ours", TINY, np.float32

        def run_packed(self, packed, longest, cache, work, last):
            assert last.rows == len(packed.slots)
            backend = self.backend
            submit(lambda: ran.append((packed.rows, backend)))
            return work.x

    ran, captures = [], []

    def captured(calls):
        captures.append(calls)
        return lambda: [call() for call in calls]

    monkeypatch.setattr(prompt, "captured", captured)
    model, cache = Model(), KVCache(TINY, 1, 32, np.float32)
    runner = PromptRunner(model, cache, Workspace(TINY, 32, np.float32))
    for count, gemv in [(3, "ours"), (3, "cublas"), (8, "ours"), (9, "cublas"), (2, "cublas")]:
        model.backend = gemv
        cache.reset(0)
        runner.run([np.zeros(count, np.int32)], [0])
    expected = [(8, "ours"), (8, "cublas"), (8, "ours"), (12, "cublas"), (8, "cublas")]
    assert ran == expected and len(captures) == 3


def test_a_prompts_graph_is_kept_by_what_chooses_its_token(monkeypatch):
    class Model:
        xp, backend, config, dtype = DEVICE, "ours", TINY, np.float32
        weights = SimpleNamespace(lm_head=None)

        def run_packed(self, packed, longest, cache, work, last):
            return work.x

    captures, chosen = [], []
    monkeypatch.setattr(prompt, "captured", lambda calls: captures.append(calls) or list)
    monkeypatch.setattr(prompt, "sample_first", lambda model, state, x, row: chosen.append(state))
    cache = KVCache(TINY, 1, 32, np.float32)
    runner = PromptRunner(Model(), cache, Workspace(TINY, 32, np.float32))
    state = SimpleNamespace(counts=None, bias=None, plain=True)
    for chooses, plain, counts in [
        (None, True, None),
        (state, True, None),
        (state, True, None),
        (state, False, None),
        (state, False, object()),
        (state, True, None),
        (None, True, None),
    ]:
        state.plain, state.counts = plain, counts
        cache.reset(0)
        runner.run([np.zeros(3, np.int32)], [0], chooses)
    assert len(captures) == 4 and chosen == [state] * 3


def test_logits_that_need_a_dequantised_matrix_are_no_part_of_a_prompts_graph(monkeypatch):
    """Or each bucket would keep memory for the matrix."""

    class Model:
        xp, backend, config, dtype = DEVICE, "ours", TINY, np.float16
        weights = SimpleNamespace(lm_head=quantize(np.ones((512, 128), np.float32)))

        def run_packed(self, packed, longest, cache, work, last):
            return work.x

    captures, order = [], []

    def captured(calls):
        captures.append(calls)
        return lambda: order.append("prompt")

    def sample_first(model, state, x, row):
        assert x.shape == (1, TINY.n_embd)
        submit(lambda: order.append("choice"))

    monkeypatch.setattr(prompt, "captured", captured)
    monkeypatch.setattr(prompt, "sample_first", sample_first)
    monkeypatch.setattr("gpt2cupy.ops.quantized.is_device_array", lambda array: True)
    monkeypatch.setattr("gpt2cupy.ops.quantized.has_mma", lambda: True)
    state = SimpleNamespace(counts=None, bias=None, plain=True)
    model, cache = Model(), KVCache(TINY, 1, 32, np.float16)
    runner = PromptRunner(model, cache, Workspace(TINY, 32, np.float16))
    for model.backend in ("cublas", "ours"):
        cache.reset(0)
        runner.run([np.zeros(3, np.int32)], [0], state)
    assert order == ["prompt", "choice", "prompt"]
    assert [len(calls) for calls in captures] == [0, 1]


class Stream:
    """A stream that is being captured or is not, as CUDA would have it."""

    capturing: Stream | None = None
    spoilt = False

    def __init__(self, non_blocking):
        assert non_blocking

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def begin_capture(self):
        assert Stream.capturing is None
        Stream.capturing = self

    def end_capture(self):
        import cupy

        assert Stream.capturing is self
        Stream.capturing = None
        if Stream.spoilt:
            raise cupy.cuda.runtime.CUDARuntimeError(901)
        return SimpleNamespace(launch=lambda stream: turns.append(blas.workspace()._depth))


turns: list[int] = []  # within how many turns each graph was launched


@pytest.fixture
def streams(machine, monkeypatch):
    cupy = machine()
    outside = SimpleNamespace(ptr=0, synchronize=lambda: None)
    cupy.cuda.Stream, cupy.cuda.get_current_stream = Stream, lambda: outside
    monkeypatch.setattr(graph, "has_clusters", lambda: False)
    monkeypatch.setattr(blas_device, "current_device", lambda: 0)
    monkeypatch.setattr(blas_device, "_turns", {})
    monkeypatch.setattr(Stream, "capturing", None)
    monkeypatch.setattr(Stream, "spoilt", False)


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("error", [ValueError("no such kernel"), KeyboardInterrupt()])
def test_a_capture_that_fails_is_ended(streams, monkeypatch, error, spoilt):
    """And the error that made it fail is the one that is seen."""

    def fail():
        raise error

    monkeypatch.setattr(Stream, "spoilt", spoilt)
    with pytest.raises(type(error)) as caught:
        graph.captured([lambda: None, fail])
    assert caught.value is error
    assert Stream.capturing is None
    monkeypatch.setattr(Stream, "spoilt", False)
    calls = []
    assert graph.captured([lambda: calls.append(Stream.capturing)])() is None
    assert blas.workspace()._depth == 0
    assert calls[0] is not None and Stream.capturing is None


def test_a_graph_that_could_not_be_captured_is_captured_again(streams):
    broken = [True]

    def launch():
        if broken:
            raise ValueError("no such kernel")

    decoder = Decoder(a_model(), lambda model, state: submit(launch), captured, "broken")
    state = a_state()
    for _ in range(2):
        with pytest.raises(ValueError, match="no such kernel"):
            decoder.step(state)
    broken.clear()
    decoder.step(state)
    assert Stream.capturing is None


def test_a_graph_is_captured_and_launched_in_its_turn(streams):
    """Its products use the workspace, and nobody may wait for a stream that is captured."""
    turns.clear()
    run = graph.captured([lambda: turns.append(blas.workspace()._depth)])
    assert turns == [1] and blas.workspace()._depth == 0
    run()
    assert turns == [1, 1] and blas.workspace()._depth == 0


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_gpu_usable():
    import cupy

    def fail():
        raise ValueError("no such kernel")

    x = cupy.zeros(4, np.float32)
    with pytest.raises(ValueError, match="no such kernel"):
        graph.captured([lambda: x.fill(1), fail])
    x += 1  # a capture left open would refuse or swallow this
    assert x.get().tolist() == [1] * 4
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        graph.captured([lambda: x.fill(3)])()
    stream.synchronize()
    assert x.get().tolist() == [3] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.9, "top_k": 20}, {"logit_bias": {3: 4.0}}])
def test_a_graph_with_the_choice_of_the_first_token_changes_no_bit(asked):
    import cupy
    from builders import model_on

    from gpt2cupy.weights import Weights

    model = model_on(cupy, TINY, Weights.random(TINY, 0, np.float16))
    params, found = SamplingParams(seed=5, **asked), {}
    for together in (True, False):
        engine = Engine(model, 1, decode="graph")
        state, found[together] = engine.state, []
        with engine.stream:
            for step, length in enumerate((1, 7, 30, 7)):
                tokens = np.arange(length, dtype=np.int32)
                engine.cache.reset()
                state.assign(0, 0, params.row(0, length, -1), params.plain)
                state.set_processors(0, None, params.logit_bias)
                state.seek(0, length - 1)
                x = engine.prompts.run([tokens], [0], state if together else None)
                if not together:
                    decode.sample_first(model, state, x[:1], 0)
                found[together].append((*state.read(0, step), state.logits.get().tolist()))
    assert found[True] == found[False]
    assert len({str(logits) for _, _, logits in found[True]}) == 3  # the last prompt is the second


@pytest.mark.gpu
def test_a_prompt_takes_the_backend_that_the_model_has_now():
    import cupy
    from builders import model_on

    from gpt2cupy.weights import Weights

    model = model_on(cupy, TINY, Weights.random(TINY, 0, np.float16))
    cache, work = model.new_cache(1), model.new_workspace(16)
    runner = PromptRunner(model, cache, work)
    tokens, found = np.arange(8, dtype=np.int32), {}
    for backend in ("ours", "cublas", "ours"):
        model.gemv = backend
        cache.reset(0)
        found.setdefault(backend, []).append(runner.run([tokens], [0]).get())
    np.testing.assert_array_equal(*found["ours"])
    np.testing.assert_allclose(found["cublas"][0], found["ours"][0], atol=2e-2)
    assert sorted(runner._buckets) == [(8, 1, 8, "cublas"), (8, 1, 8, "ours")]


def test_paths_by_the_kind_of_arrays():
    assert list(decode.paths(np)) == ["eager"]
    assert list(decode.paths(DEVICE)) == ["eager", "graph", "persistent"]


def test_nothing_is_recorded_after_a_recording_that_failed():
    with pytest.raises(ValueError, match="half-way"), recorded() as calls:
        submit(print)
        raise ValueError("half-way")
    ran = []
    submit(lambda: ran.append(1))
    assert ran == [1] and calls == [print]


def test_a_state_of_fewer_rows_has_mailboxes_of_its_own_and_is_freed():
    """Their layout follows from the number of rows: what others wrote could pass for a flag."""
    model = GPT2.random(TINY, 0, device="cpu")
    state = DecodeState(model, model.new_cache(4), 4)
    state.mailboxes = np.zeros(8, np.uint8)
    view = state.first(2)
    assert view.mailboxes is None and view.cache is state.cache
    freed = weakref.ref(view)
    gc.disable()
    try:
        del view, state
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("late", [False, True])
def test_a_state_of_fewer_rows_is_the_same_memory(xp, late):
    """Also counts and bias, whether they appear before it is asked for or after."""
    from builders import model_on

    from gpt2cupy.weights import Weights

    model = model_on(xp, TINY, Weights.random(TINY, 0))
    state = DecodeState(model, model.new_cache(4), 4)
    view = state.first(2) if late else None
    state.set_processors(1, np.array([3]), {5: 1.0})
    view = view or state.first(2)
    assert view.batch == 2 and view is state.first(2) and state.first(4) is state
    for name in ("ids", "positions", "slots", "params", "logits", "ring", "counts", "bias"):
        whole, part = getattr(state, name), getattr(view, name)
        assert part.shape == (2, *whole.shape[1:])
        place = [a.ctypes.data if xp is np else a.data.ptr for a in (whole, part)]
        assert place[0] == place[1]
    assert view.bias[1, 5] == 1 and view.work.rows == 2
    assert view.plain == state.plain


def test_a_runner_keeps_the_graphs_used_last(monkeypatch):
    """Each shape of packed prompts is a graph: there are no more than so many at a time."""
    monkeypatch.setattr(prompt, "MOST_GRAPHS", 3)
    model = GPT2.random(TINY, 0, device="cpu")
    runner = PromptRunner(model, model.new_cache(8), model.new_workspace(48))
    monkeypatch.setattr(runner, "_graphs", True)
    monkeypatch.setattr(runner, "_queue", lambda packed, longest, state: packed.ids)
    first, second = prompt.Shape(8, 1, 8), prompt.Shape(12, 1, 12)
    kept = runner._bucket(first, None)
    for rows in (12, 16, 24, 32):
        runner._bucket(prompt.Shape(rows, 1, rows), None)
        assert runner._bucket(first, None) is kept
    assert len(runner._buckets) == 3
    assert not any(key[:3] == second for key in runner._buckets)


@given(st.lists(st.integers(1, 48), min_size=1, max_size=8))
def test_a_shape_has_room_for_its_sequences(lengths):
    model = GPT2.random(TINY, 0, device="cpu")
    runner = PromptRunner(model, model.new_cache(8), model.new_workspace(384))
    runner._graphs = True
    shape = runner._shape(lengths)
    assert shape.rows >= sum(lengths) and shape.sequences >= len(lengths)
    assert shape.rows >= shape.longest >= max(lengths)
    assert shape.longest in (shape.rows, 1, 4, 16, 64, 256, 1024)


def test_a_bias_is_cleared_where_it_was_and_moves_with_its_row():
    model = GPT2.random(TINY, 0, device="cpu")
    state = DecodeState(model, model.new_cache(3), 3)
    state.set_processors(0, None, {4: 2.0})
    state.set_processors(1, [5], None)
    assert state.bias[0, 4] == 2 and not state.bias[1:].any() and state.counts[1, 5]
    state.move(0, 2)
    assert state.bias[2, 4] == 2
    state.set_processors(2, None, None)  # the next text of the row
    state.set_processors(0, None, None)
    assert not state.bias.any()


def test_sampling_by_a_temperature_alone_does_not_depend_on_processors():
    from gpt2cupy.decode.decoder import sampling_of

    model = GPT2.random(TINY, 0, device="cpu")
    state = DecodeState(model, model.new_cache(2), 2)
    before = sampling_of(state)
    state.set_processors(0, [1], {2: 1.0})
    assert sampling_of(state) == before
    state.shaped.add(0)
    assert sampling_of(state)[1] is state.counts
