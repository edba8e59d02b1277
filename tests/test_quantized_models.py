"""Weight-only int8: the models and commands that hold it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from builders import TINY, copied, host
from command import CPU, call, done
from error_rule import DTYPES

import gpt2cupy
from gpt2cupy import GPT2, GPT2Config, checkpoint
from gpt2cupy.cli import validation
from gpt2cupy.decode import DecodeState, decoder
from gpt2cupy.errors import InputError
from gpt2cupy.loading import place, weight_tensors
from gpt2cupy.quantize import (
    MATRICES,
    QuantizedMatrix,
    dequantize,
    quantize,
    scale_shape,
    through_int8,
)
from gpt2cupy.validate import runs, validate
from gpt2cupy.weights import RESIDUAL_BIASES, Weights, weight_shapes

# Head size 16, and widths that the kernels take (multiples of 16) though not whole groups of 64.
SMALL = GPT2Config(vocab_size=211, n_positions=48, n_embd=80, n_layer=2, n_head=5)
WIDE = GPT2Config(vocab_size=1000, n_positions=48, n_embd=768, n_layer=2, n_head=12)


def quantized_weights(config, weights, xp=np):
    """Weights that hold int8 themselves, on the host or the first GPU."""
    if xp is not np:
        tensors = weight_tensors(config, weights)
        return place(config, tensors, weights.dtype, "cuda", 0, quantize="int8")
    held = Weights.empty(config, weights.dtype, quantize="int8")
    for name, layer, array in weight_tensors(config, weights):
        target = getattr(held, name)
        target = target if layer is None else target[layer]
        if isinstance(target, QuantizedMatrix):
            made = quantize(array)
            target.values[: len(array)], target.scales[:, : len(array)] = made.values, made.scales
        else:
            target[...] = array
    return held


@pytest.mark.parametrize("tied", [True, False])
def test_the_layout_holds_a_byte_per_weight_and_the_scales(tied):
    config = GPT2Config(vocab_size=300, n_positions=8, n_embd=96, n_layer=3, n_head=2,
                        tie_word_embeddings=tied)  # fmt: skip
    weights = Weights.empty(config, np.float16, quantize="int8")
    plain = Weights.empty(config, np.float16)
    products = {name for name in weight_shapes(config) if name[-2:] == "_w" and name[:2] != "ln"}
    assert set(MATRICES) == products | {"wte", "lm_head"}
    saved = 0
    for name, shape in weight_shapes(config).items():
        if name in MATRICES:
            array = getattr(weights, name)
            assert array.values.shape == shape and array.scales.shape == scale_shape(shape)
            assert array.nbytes == np.prod(shape) + 2 * np.prod(scale_shape(shape))
            saved += 2 * np.prod(shape) - array.nbytes
            assert array.values.ctypes.data % 256 == array.scales.ctypes.data % 256 == 0
    assert abs(plain.nbytes - weights.nbytes - saved) <= 256 * 2 * len(MATRICES)
    assert (weights.lm_head is weights.wte) is tied
    assert weights.dtype == np.float16 and weights.qkv_w[1].shape == (3 * 96, 96)
    with pytest.raises(IndexError):
        weights.wte[0]


def test_a_model_in_int8_is_the_model_of_its_dequantised_weights(xp):
    config, ids = SMALL, np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 40))
    weights = Weights.random(config, 0)
    rounded = Weights.from_tensors(
        config, through_int8(weight_tensors(config, weights)), np.float32
    )
    expected = GPT2(config, rounded)(ids)
    model = GPT2(config, quantized_weights(config, weights, xp))
    for name, array in runs.host_weights(model).items():
        if isinstance(array, QuantizedMatrix):
            array = dequantize(array)
        np.testing.assert_array_equal(array, getattr(rounded, name))
    np.testing.assert_allclose(host(model(ids)), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - GPT2(config, weights)(ids)).max() > 1e-4


def test_random_and_loaded_models_take_the_option(tmp_path):
    ids = np.arange(20)[None]
    plain, int8 = (GPT2.random(SMALL, 3, device="cpu", quantize=q) for q in (None, "int8"))
    apart = np.abs(plain(ids) - int8(ids)).max()
    assert 0 < apart < 0.05 * np.abs(plain(ids)).max()
    with gpt2cupy.load(device="cpu", quantize="int8") as lm, gpt2cupy.load(device="cpu") as stored:
        text = "To be, or not to be: that is the question."
        bits = [model.score(text).bits_per_byte(text) for model in (stored, lm)]
    assert bits[0] != bits[1] and bits[1] == pytest.approx(bits[0], rel=0.01)
    again = GPT2.from_pretrained(device="cpu", quantize="int8")
    assert not np.array_equal(again.weights.qkv_w, GPT2.from_pretrained(device="cpu").weights.qkv_w)
    np.testing.assert_array_equal(again.weights.wpe, GPT2.from_pretrained(device="cpu").weights.wpe)


@pytest.mark.parametrize("make", [gpt2cupy.load, GPT2.from_pretrained])
def test_another_kind_is_refused_before_anything_is_read(make):
    with pytest.raises(InputError, match="unknown quantization 'int4'") as caught:
        make("no such model", device="cpu", quantize="int4")
    assert caught.value.where == "quantize" and "'int8'" in caught.value.remedy


def test_validation_tells_int8_from_what_was_stored():
    weights = Weights.random(SMALL, 0)
    tensors = through_int8(weight_tensors(SMALL, weights))
    rounded = Weights.from_tensors(SMALL, tensors, np.float32)
    model = GPT2(SMALL, quantized_weights(SMALL, weights))
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 24))
    assert all(found.passed for found in validate(model, ids, weights=rounded))
    assert not all(found.passed for found in validate(model, ids, weights=weights))


def test_every_command_that_loads_a_model_takes_the_option():
    int8 = (*CPU, "--quantize", "int8")
    text = "To be, or not to be: that is the question."
    scores = [json.loads(done("score", text, *how, "--json")) for how in (CPU, int8)]
    assert 0 < abs(scores[0]["bits_per_byte"] - scores[1]["bits_per_byte"]) < 0.05
    code, written, says = call("generate", "ROMEO:", *int8, "--max-new-tokens", "3")
    assert code == 0 and written.startswith("ROMEO:")
    assert "float32 with matrices in int8 on cpu" in says
    shown = done("info", *int8)
    assert "matrices in int8, on the CPU dequantised" in shown
    assert json.loads(done("info", *int8, "--json"))["model"]["quantize"] == "int8"
    profiled = done("profile", *int8, "--warmup", "0", "--runs", "1", "--tokens", "2", "--json")
    assert json.loads(profiled)["quantize"] == "int8"
    assert "PASS" in done("validate", *int8, "--steps", "2")
    code, _, says = call("validate", *int8, "--against", "hf")
    assert code == 1 and "--quantize" in says
    assert call("score", text, "--quantize", "int4")[0] == 2


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_what_a_gpu_should_hold_is_exact_in_float32(kind):
    source, held = checkpoint.open("shakespeare"), DTYPES[kind]
    stored = Weights.from_tensors(source.config, source.tensors(), np.float32)
    found = validation._host_weights(source, held, "int8")
    assert found.dtype == np.float32
    for name, array in found.items():
        if name in MATRICES:
            given = getattr(stored, name).reshape(-1, array.shape[-1])
            np.testing.assert_array_equal(array.reshape(given.shape), dequantize(quantize(given)))
            assert not np.array_equal(array, getattr(stored, name))
        elif name in RESIDUAL_BIASES:
            np.testing.assert_array_equal(array, getattr(stored, name))
        else:
            np.testing.assert_array_equal(array, getattr(stored, name).astype(held))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("config", [SMALL, TINY, WIDE], ids=["small", "tiny", "wide"])
def test_every_path_agrees_with_float64_of_the_dequantised_weights(dtype, batch, config):
    weights = Weights.random(config, 0)
    exact = Weights.from_tensors(config, through_int8(weight_tensors(config, weights)), np.float32)
    for name, array in exact.items():
        if name not in (*MATRICES, *RESIDUAL_BIASES):
            array[...] = array.astype(dtype)
    tensors = weight_tensors(config, copied(config, weights))
    model = GPT2(config, place(config, tensors, dtype, "cuda", 0, quantize="int8"))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, 30))
    for prefilled in (0, 20):
        for found in validate(model, ids, prefilled=prefilled, weights=exact):
            assert found.passed, found
    # Read back from the device, the values are the same.
    for name, array in runs.host_weights(model).items():
        np.testing.assert_array_equal(array, getattr(exact, name))


@pytest.mark.gpu
def test_a_batch_needs_scratch_only_where_no_kernel_reads_int8():
    import cupy

    model = GPT2.random(SMALL, 0, dtype="float16", device="cuda", quantize="int8")
    assert model.new_workspace(1).scratch is None
    work = model.new_workspace(100)
    assert work.scratch.size == 4 * 80 * 80 and work.first(3).scratch is work.scratch
    assert work.nbytes > model.new_workspace(100).first(50).nbytes
    float32 = GPT2.random(SMALL, 0, dtype="float32", device="cuda", quantize="int8")
    assert float32.new_workspace(1).scratch is None
    assert float32.new_workspace(2).scratch.dtype == np.float32
    # A step of one row allocates nothing once it is prepared.
    cache = model.new_cache(1)
    state, eager = DecodeState(model, cache, 1), decoder(model, "eager")
    eager.prepare(state)
    before = cupy.get_default_memory_pool().used_bytes()
    eager.step(state)
    assert cupy.get_default_memory_pool().used_bytes() == before
