"""linear and ffn of tensors, and the module of a feed-forward network, beside PyTorch's."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from error_rule import check

torch = pytest.importorskip("torch")

from gpt2cupy import torch as ours  # noqa: E402
from gpt2cupy.errors import InputError  # noqa: E402
from gpt2cupy.torch import launches, products  # noqa: E402

functional = torch.nn.functional


@pytest.fixture
def kind(dtype):
    return getattr(torch, dtype.name)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 17, 300])
def test_the_feed_forward_network_beside_pytorchs(dtype, kind, rows):
    """Called twice: the second finds the launches of the first, those of cuBLASLt too."""
    torch.manual_seed(0)
    module = ours.FeedForward(64, 256, device="cuda", dtype=kind)
    for _ in range(2):
        x, residual = (torch.randn(2, rows, 64, device="cuda", dtype=kind) for _ in range(2))
        with torch.inference_mode():
            mine = module(x, residual)
            one, two = module.linear1, module.linear2
            theirs = residual + two(functional.gelu(one(x), approximate="tanh"))
            wide = [t.double() for t in (x, one.weight, one.bias, two.weight, two.bias, residual)]
            hidden = functional.gelu(functional.linear(*wide[:3]), approximate="tanh")
            exact = (wide[5] + functional.linear(hidden, *wide[3:5])).cpu().numpy()
        found = (mine.float().cpu().numpy(), theirs.float().cpu().numpy(), exact)
        check(*found, dtype, "FeedForward")
    if rows > 1:
        with pytest.raises(InputError, match=r"x is .* not contiguous"), torch.inference_mode():
            module(x.transpose(0, 1))


def test_a_feed_forward_network_has_no_gradient():
    module = ours.FeedForward(8, 16)
    assert [name for name, _ in module.named_parameters()] == [
        "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias",
    ]  # fmt: skip
    with pytest.raises(InputError, match="needs a gradient"):
        module(torch.zeros(2, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 300])
def test_a_graph_and_the_compiler_take_products(rows):
    module = ours.FeedForward(64, 256, device="cuda", dtype=torch.float16)
    x = torch.randn(rows, 64, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        expected = module(x)
        compiled = torch.compile(module, fullgraph=True)(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            module(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            y = module(x)
        x.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        again = module(x)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(y, again, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 17])
def test_all_that_a_product_is_made_of_can_be_seen_by_cupy(monkeypatch, rows):
    """Its arguments, its output, and the bytes that cuBLASLt works in."""
    x, w = torch.zeros(rows, 8), torch.zeros(4, 8)
    given = x, w, torch.zeros(4), None, None
    made = [products._outputs(x, w, None), products._memory(*given)]
    made += [torch.zeros(2, dtype=kind) for kind in launches.DTYPES]
    cuda = SimpleNamespace(UnownedMemory=lambda *a: a, MemoryPointer=lambda *a: a)
    cupy = SimpleNamespace(cuda=cuda, ndarray=lambda shape, dtype, *rest: (shape, dtype))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for tensor in (x, w, *made):
        shape, dtype = launches.view(tensor)
        assert shape == tuple(tensor.shape) and dtype.itemsize == tensor.element_size()
    assert launches.view(made[1])[1] == np.uint8
    with pytest.raises(InputError, match=r"no tensors of torch\.float64"):
        launches.view(torch.zeros(2, dtype=torch.float64))
