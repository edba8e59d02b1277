"""Which device is taken, and what is said of GPUs and installations that cannot be used."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
from builders import TINY
from fake_cupy import CUDADriverError, CUDARuntimeError, OutOfMemoryError, packages

import gpt2cupy
from gpt2cupy import GPT2, checkpoint, loading
from gpt2cupy.errors import DeviceError, DeviceMemoryError, Gpt2CupyError, InputError, NoDeviceError
from gpt2cupy.generation.rows import Rows
from gpt2cupy.ops.core import device as device_module


@pytest.fixture
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


def refused(kind=DeviceError, **options):
    """The error that loading on a GPU ends with."""
    with pytest.raises(Gpt2CupyError) as caught:
        gpt2cupy.load("shakespeare", **{"device": "cuda"} | options)
    assert type(caught.value) is kind
    assert caught.value.what and caught.value.where and caught.value.remedy
    assert "\n" not in str(caught.value)
    return caught.value


def takes_the_cpu_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return loading.resolve_device("auto") == ("cpu", 0)


def takes_the_cpu_and_says(reason):
    with pytest.warns(RuntimeWarning, match=f"running on the CPU: .*{reason}"):
        return loading.resolve_device("auto") == ("cpu", 0)


def test_cupy_missing(machine, monkeypatch):
    packages(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", None)
    error = refused(NoDeviceError)
    assert error.what == "CuPy is not installed" and "gpt2cupy[cuda12]" in error.remedy
    assert takes_the_cpu_silently()


def test_two_cupy_packages(machine, monkeypatch):
    machine()
    packages(monkeypatch, "cupy-cuda12x", "cupy-cuda13x")
    error = refused()
    assert error.where == "cupy-cuda12x, cupy-cuda13x"
    assert "pip uninstall cupy-cuda12x cupy-cuda13x" in error.remedy
    assert takes_the_cpu_and_says("2 CuPy packages")


@pytest.mark.parametrize("kind", [ImportError, RuntimeError, OSError])
def test_cupy_that_cannot_be_imported(machine, monkeypatch, kind):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "cupy":
                raise kind("=====\na page of advice") from OSError("libsomething.so.1 is missing")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    error = refused()
    assert error.what == "CuPy cannot be imported: libsomething.so.1 is missing"
    assert error.where == "cupy-cuda12x"
    assert takes_the_cpu_and_says("libsomething")


def test_no_gpu(machine):
    machine(gpus=0)
    assert "device='cpu'" in refused(NoDeviceError).remedy
    assert takes_the_cpu_silently()
    machine(status=100)
    assert "device='cpu'" in refused(NoDeviceError).remedy
    assert takes_the_cpu_silently()


def test_no_driver_and_an_old_driver(machine):
    machine(status=35, driver=0)
    assert "driver" in refused(NoDeviceError).remedy
    assert takes_the_cpu_silently()
    machine(status=35, driver=11040)
    assert "update the driver" in refused().remedy
    assert takes_the_cpu_and_says("cudaError35")


@pytest.mark.parametrize("capability, shown", [("70", "7.0"), ("35", "3.5")])
def test_an_old_gpu(machine, capability, shown):
    machine(capability=capability)
    error = refused()
    assert f"compute capability {shown}" in error.what and "7.5" in error.remedy
    assert error.where == "cuda:0, Some GPU"
    assert takes_the_cpu_and_says(f"compute capability {shown}")


@pytest.mark.parametrize("capability", ["75", "90", "120"])
def test_gpus_that_are_new_enough(machine, capability):
    machine(gpus=2, capability=capability)
    assert loading.resolve_device("cuda:1") == ("cuda", 1)
    assert loading.resolve_device("cuda") == loading.resolve_device("auto") == ("cuda", 0)
    assert device_module.device_arch(0) == f"sm_{capability}"


@pytest.mark.parametrize("count, says", [(1, "has cuda:0."), (4, "has cuda:0 to cuda:3.")])
def test_a_device_number_that_does_not_exist(machine, count, says):
    machine(gpus=count)
    error = refused(InputError, device=f"cuda:{count}")
    assert error.what == f"there is no cuda:{count}" and says in error.remedy


@pytest.mark.parametrize(
    "device", ["tpu", "", "cuda:", "cuda:x", "cuda:-1", "cuda:\u0660", "cuda:1 ", "CUDA", None, 0]
)
def test_what_is_no_device(device):
    assert "cuda:1" in refused(InputError, device=device).remedy


@pytest.mark.parametrize("dtype", ["int8", "", "Float16", None, np.float16, ["float16"]])
def test_what_is_no_dtype(dtype):
    assert "bfloat16" in refused(InputError, device="cpu", dtype=dtype).remedy


@pytest.mark.parametrize("dtype", ["float16", "fp16", np.dtype(np.float16)])
def test_dtypes(dtype):
    assert loading.resolve_dtype(dtype, np.dtype(np.float32), "cuda") == np.float16
    with pytest.warns(RuntimeWarning, match="dtype='float16' is for a GPU.*float32"):
        assert loading.resolve_dtype(dtype, np.dtype(np.float16), "cpu") == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bf16", "bfloat16", "auto", "float32", "fp32"])
def test_another_dtype_on_the_cpu_is_said_once(dtype):
    """By every way to load; what is kept, or was not asked for, is no warning."""
    for load in (
        lambda: gpt2cupy.load(dtype=dtype, device="cpu").model,
        lambda: GPT2.from_pretrained(dtype=dtype, device="cpu"),
        lambda: GPT2.random(TINY, dtype=dtype, device="cpu"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load().dtype == np.float32
        kept = dtype in ("auto", "float32", "fp32")
        assert [c.category for c in caught] == ([] if kept else [RuntimeWarning])
        if not kept:
            assert caught[0].filename == __file__, "it points at the caller"


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"dtype": "int8"}])
def test_arguments_are_checked_before_anything_is_downloaded(monkeypatch, options):
    monkeypatch.setattr(checkpoint, "open", lambda *args, **kwargs: pytest.fail("opened"))
    with pytest.raises(InputError):
        gpt2cupy.load("gpt2-xl", **{"device": "cpu"} | options)


@pytest.mark.parametrize("tokenizer", [3, ["vocab.json"]])
def test_what_is_no_tokenizer(tokenizer):
    assert refused(InputError, device="cpu", tokenizer=tokenizer).where == "tokenizer"


def test_memory_exhausted_by_weights(machine, lm):
    machine()
    error = refused(DeviceMemoryError)
    assert "for the weights: no room for 123 bytes" in error.what and "dtype" in error.remedy
    assert isinstance(error, MemoryError)
    assert lm.generate("ROMEO:", max_new_tokens=2).tokens


@pytest.mark.parametrize(
    "raised, kind, says",
    [
        (OutOfMemoryError("no room"), DeviceMemoryError, "too little free memory"),
        (CUDARuntimeError(2), DeviceMemoryError, "too little free memory"),
        (CUDADriverError(2), DeviceMemoryError, "too little free memory"),
        (CUDARuntimeError(700), DeviceError, "CUDA failed: cudaError700"),
    ],
    ids=str,
)
def test_a_gpu_that_fails_in_a_call(machine, lm, monkeypatch, raised, kind, says):
    expected = lm.generate("ROMEO:", max_new_tokens=4)

    def fail(*args, **kwargs):
        raise raised

    with monkeypatch.context() as patch:
        machine()
        patch.setattr(lm._session, "gpu", 0)
        patch.setattr(Rows, "step", fail)
        for call in (lambda: lm.generate("a"), lambda: list(lm.stream("a"))):
            with pytest.raises(Gpt2CupyError, match=says) as caught:
                call()
            assert type(caught.value) is kind
            assert caught.value.where and caught.value.remedy
    assert lm.generate("ROMEO:", max_new_tokens=4) == expected


# -- on real GPUs --------------------------------------------------------------------------------


@pytest.fixture
def little_memory():
    """CuPy may take only so many bytes more."""
    import cupy

    pool = cupy.get_default_memory_pool()

    def limit(more):
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() + more)

    yield limit
    pool.set_limit(size=0)


@pytest.mark.gpu
def test_gpu_memory_exhausted(little_memory):
    import cupy

    with gpt2cupy.load(device="cuda") as lm:
        expected = lm.generate("ROMEO:", max_new_tokens=4)
        for more, call in (
            (1 << 20, lambda: gpt2cupy.load(device="cuda")),
            (32 << 20, lambda: lm.generate(["ROMEO:"] * 64, max_batch=64)),
            (1 << 20, lambda: lm([[1] * 512] * 8)),
        ):
            little_memory(more)
            with pytest.raises(DeviceMemoryError) as caught:
                call()
            assert caught.value.where and caught.value.remedy
            cupy.get_default_memory_pool().set_limit(size=0)
            assert lm.generate("ROMEO:", max_new_tokens=4) == expected


@pytest.mark.gpu
def test_another_gpu():
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    with pytest.raises(InputError, match=f"no cuda:{count}"):
        gpt2cupy.load(device=f"cuda:{count}")
    if count < 2:
        pytest.skip("this machine has one GPU")
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 1}
    mine = cupy.cuda.runtime.getDevice()
    with gpt2cupy.load(device="cuda") as first, gpt2cupy.load(device="cuda:1") as second:
        assert second.device.startswith("cuda:1 ") and second.model.weights.wte.device.id == 1
        expected = first.generate("ROMEO:", **options)
        assert second.generate("ROMEO:", **options) == expected
        streams = [model.stream("ROMEO:", **options) for model in (first, second)]
        for one, other in zip(*streams, strict=True):
            assert one.text == other.text
            assert cupy.cuda.runtime.getDevice() == mine, "the caller's device is left alone"
        assert second([[1, 2]]).device.id == 1
        np.testing.assert_array_equal(second.score("To be").logprobs, first.score("To be").logprobs)
