"""What kernels declare is what their sources take."""

from __future__ import annotations

import importlib
import pkgutil
import re

import numpy as np
import pytest
from kernel_entries import kernel_entries

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops.core import cuda_source, launch
from gpt2cupy.ops.core.entries import check_entry, entries
from gpt2cupy.ops.core.launch import Kernel

RIGHT = "x: float32[N,C], weight: ELEM[C], bias: ELEM[C], out: ELEM[N,C], eps: float, N, C"


def kernels(value):
    """The kernels in a module, or in tables in it."""
    if isinstance(value, Kernel):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from kernels(each)


def declared():
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            yield from kernels(value)


def test_every_kernel_declares_what_its_source_takes():
    found = set(declared())
    for kernel in found:
        check_entry(kernel.source, kernel.entry, kernel.parameters)
    assert {(kernel.source, kernel.entry) for kernel in found} == kernel_entries()


def test_every_entry_is_read():
    for source in cuda_source.sources():
        text = cuda_source.source_text(source)
        made = sum(
            len(re.findall(rf"^{define[1]}\(", text, re.MULTILINE)) * define[2].count('extern "C"')
            for define in re.finditer(r"#define (\w+)\([^)]*\)((?:.*\\\n)*.*)", text)
        )
        plain = len(re.findall(r'^extern "C"', text, re.MULTILINE))
        assert len(entries(source)) == made + plain, source


@pytest.mark.parametrize(
    "signature, says",
    [
        (RIGHT.removesuffix(", C"), "declares 6 parameters, the source 7"),
        (RIGHT + ", x_stride", "declares 8 parameters, the source 7"),
        (RIGHT.replace("float32", "ELEM"), r"where x is float\* x"),
        (RIGHT.replace("eps: float", "eps: int"), "where eps is float eps"),
        (RIGHT.replace("eps: float, N, C", "N, C, eps: float"), "where N is float eps"),
        (RIGHT.replace("N, C", "C, N"), "where C is int N"),
        (RIGHT.replace("weight", "b").replace("bias", "weight"), r"where weight is elem_t\* bias"),
    ],
)
def test_what_differs_is_refused(signature, says):
    kernel = Kernel("norm.cu", "layer_norm_naive", signature)
    with pytest.raises(InputError, match=says) as caught:
        check_entry(kernel.source, kernel.entry, kernel.parameters)
    assert caught.value.where == "norm.cu: layer_norm_naive" and caught.value.remedy
    assert "(float* x, elem_t* weight, elem_t* bias, elem_t* y, float eps, int N, int C)" in str(
        caught.value
    )
    assert f"{kernel.parameters[0].name}, " in str(caught.value), "both lists are shown"


def test_an_entry_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"norm\.cu has no entry layernorm") as caught:
        check_entry("norm.cu", "layernorm", ())
    assert "layer_norm_naive" in caught.value.remedy


def test_a_kernel_is_checked_before_it_is_loaded_and_once(monkeypatch):
    checked, loaded = [], []

    class Module:
        @staticmethod
        def get_function(entry):
            return entry

    monkeypatch.setattr(launch, "load", lambda *given: loaded.append(given) or Module)
    monkeypatch.setattr(
        launch, "check_entry", lambda *given: checked.append(given) or check_entry(*given)
    )
    half = np.dtype(np.float16)
    wrong = Kernel("norm.cu", "layer_norm_naive", RIGHT + ", x_stride")
    with pytest.raises(InputError, match="declares 8 parameters"):
        launch._function(0, wrong, half, None, None, 0)
    assert len(checked) == 1 and not loaded
    right = Kernel("norm.cu", "layer_norm_naive", RIGHT)
    for _ in range(2):
        assert launch._function(0, right, half, None, None, 0) == "layer_norm_naive"
    assert len(checked) == 2 and len(loaded) == 1
    launch._function.cache_clear()
