"""The folded biases of one-row steps: for which models, made when, and read by which ops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from builders import TINY

from gpt2cupy import ops, shifts
from gpt2cupy.decode import Decoder, DecodeState, launched, ops_step, persistent_step
from gpt2cupy.model import GPT2
from gpt2cupy.ops.core.tape import recorded, submit
from gpt2cupy.weights import Weights


def device(events):
    """What stands for CuPy: NumPy's arrays, and a stream that says when it is waited for."""
    stream = SimpleNamespace(synchronize=lambda: events.append("wait"))
    cuda = SimpleNamespace(get_current_stream=lambda: stream)
    return SimpleNamespace(empty=np.empty, cuda=cuda)


@pytest.fixture
def used(monkeypatch):
    """A kernel that has a use for shifts, for NumPy's arrays."""
    monkeypatch.setattr(shifts, "takes_shift", lambda weight, backend: backend == "ours")


@pytest.fixture
def launching(used, monkeypatch):
    """ops.shifted_bias as a kernel that is launched; the list of what ran."""
    ran = []

    def shifted_bias(*args, out):
        submit(lambda: ran.append("run"))
        return out

    monkeypatch.setattr(ops, "shifted_bias", shifted_bias)
    return ran


def model(**options):
    return GPT2(TINY, Weights.random(TINY, 0), **options)


def test_every_layer_has_those_of_its_own_products(used):
    tiny = model()
    tiny.shifts.record(np)
    w, c, f = tiny.weights, TINY.n_embd, TINY.inner_size
    assert tiny.shifts.nbytes == TINY.n_layer * (3 * c + f) * 4
    assert len(tiny.shifts.pairs) == TINY.n_layer
    for i, (qkv, fc) in enumerate(tiny.shifts.pairs):
        assert qkv.dtype == fc.dtype == np.float32
        np.testing.assert_array_equal(qkv, ops.shifted_bias(w.ln1_b[i], w.qkv_w[i], w.qkv_b[i]))
        np.testing.assert_array_equal(fc, ops.shifted_bias(w.ln2_b[i], w.fc_w[i], w.fc_b[i]))
    before = tiny.shifts.pairs
    tiny.shifts.record(np)
    assert tiny.shifts.pairs is before


def test_they_are_recorded_then_made_once_and_waited_for(launching):
    tiny, xp = model(), device(launching)
    tiny.shifts.make(xp)
    assert launching == []
    tiny.shifts.record(xp)
    tiny.shifts.record(xp)
    assert launching == []
    tiny.shifts.make(xp)
    tiny.shifts.make(xp)
    assert launching == ["run"] * 2 * TINY.n_layer + ["wait"]


def test_a_step_that_runs_finds_them_made_and_one_that_is_recorded_does_not_wait(launching):
    tiny, xp = model(), device(launching)
    tiny.shifts.record(xp)
    with recorded() as calls:
        pairs = tiny.shifts.of_step(xp)
    assert launching == calls == []
    assert tiny.shifts.of_step(xp) is pairs and launching[-1] == "wait"


def test_what_failed_is_made_by_the_next_try(used, monkeypatch):
    ran = []

    def launch():
        ran.append("run")
        if len(ran) == 1:
            raise RuntimeError("no kernel")

    monkeypatch.setattr(ops, "shifted_bias", lambda *args, out: submit(launch))
    tiny, xp = model(), device(ran)
    tiny.shifts.record(xp)
    with pytest.raises(RuntimeError):
        tiny.shifts.make(xp)
    tiny.shifts.make(xp)
    assert ran == ["run"] * (1 + 2 * TINY.n_layer) + ["wait"]


def test_only_a_kernel_that_takes_one_has_one(monkeypatch):
    def narrow(weight, backend):
        return len(weight) == 3 * TINY.n_embd

    monkeypatch.setattr(shifts, "takes_shift", narrow)
    tiny = model()
    assert tiny.shifts.nbytes == TINY.n_layer * 3 * TINY.n_embd * 4
    tiny.shifts.record(np)
    assert all(len(qkv) == 3 * TINY.n_embd and fc is None for qkv, fc in tiny.shifts.pairs)


def test_no_other_backend_has_any(used):
    tiny = model()
    assert tiny.shifts.nbytes > 0
    tiny.gemv = "cublas"
    assert tiny.shifts.nbytes == 0
    tiny.gemv = "ours"
    assert tiny.shifts.nbytes > 0
    assert model(batch_invariant=True).shifts.nbytes == 0


def test_numpy_has_no_use_for_shifts():
    tiny = model()
    tiny.prepare_step(1)
    assert tiny.shifts.nbytes == 0 and set(tiny.shifts.pairs) == {(None, None)}


@pytest.mark.parametrize(
    ("rows", "function", "expected"), [(1, ops_step, 1), (2, ops_step, 0), (1, persistent_step, 0)]
)
def test_a_step_of_one_row_records_them_and_makes_them_before_it_runs(
    launching, rows, function, expected
):
    tiny = model()
    state = DecodeState(tiny, tiny.new_cache(rows), rows)
    state.xp = device(launching)
    seen = []

    def step(model, state):
        seen.append(model.shifts.pairs[0][0] is not None)
        submit(lambda: launching.append("step"))

    decoder = Decoder(tiny, step, launched, "eager", by_ops=function is ops_step)
    decoder.record(state)
    assert launching == [] and seen == [bool(expected)]
    decoder.step(state, 2)
    made = ["run"] * 2 * TINY.n_layer + ["wait"] if expected else []
    assert launching == [*made, "step", "step"]
    assert len(decoder.calls) == 1


def test_a_change_of_gemv_between_recording_and_running_leaves_none_unmade(launching):
    tiny = model()
    state = DecodeState(tiny, tiny.new_cache(1), 1)
    state.xp = device(launching)

    def step(model, state):
        submit(lambda: launching.append("step"))

    decoder = Decoder(tiny, step, launched, "eager", by_ops=True)
    decoder.record(state)
    tiny.gemv = "cublas"
    tiny.gemv = "ours"
    decoder.step(state)
    assert launching == ["run"] * 2 * TINY.n_layer + ["wait", "step"]


def test_steps_hand_them_to_their_products_and_prompts_do_not(used, monkeypatch):
    seen, real = [], ops.norm_linear

    def spied(*args, shift=None, **options):
        seen.append(shift)
        return real(*args, **options)

    monkeypatch.setattr(ops, "norm_linear", spied)
    tiny = model()
    tiny.shifts.record(np)
    cache, work = tiny.new_cache(1), tiny.new_workspace(1)
    zero, logits = np.zeros(1, np.int32), np.empty((1, TINY.padded_vocab_size), np.float32)
    tiny.decode(zero, zero, zero, cache, work, logits)
    pairs = [shift for pair in tiny.shifts.pairs for shift in pair]
    assert len(seen) == len(pairs) + 1 and seen[-1] is None  # the logits
    assert all(ours is theirs for ours, theirs in zip(seen, pairs, strict=False))
    seen.clear()
    tiny(np.zeros((1, 1), np.int32))
    assert seen and set(seen) == {None}
    seen.clear()
    two, work = np.zeros(2, np.int32), tiny.new_workspace(2)
    logits = np.empty((2, TINY.padded_vocab_size), np.float32)
    tiny.decode(two, two, np.arange(2, dtype=np.int32), tiny.new_cache(2, 4), work, logits)
    assert seen and set(seen) == {None}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_gpu_makes_them(dtype):
    import cupy

    tiny = GPT2.random(TINY, 0, dtype=dtype, device="cuda")
    assert tiny.shifts.nbytes > 0
    tiny.prepare_step(2)
    assert tiny.shifts.pairs[0] == (None, None)
    tiny.prepare_step(1)
    names = ("fc_w", "ln2_b", "fc_b")
    weight, norm_bias, bias = (
        cupy.asnumpy(tiny.layers[1][name]).astype(np.float64) for name in names
    )
    found = cupy.asnumpy(tiny.shifts.pairs[1][1])
    np.testing.assert_allclose(found, weight @ norm_bias + bias, atol=1e-6)
