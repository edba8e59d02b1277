"""gpt2cupy.torch: the ops as operators of PyTorch. Without a GPU: schemas, shapes, refusals."""

from __future__ import annotations

import inspect
import threading

import numpy as np
import pytest
from error_rule import DTYPES, check
from odd_values import ODD
from op_checks import draw

torch = pytest.importorskip("torch")

from gpt2cupy import ops  # noqa: E402
from gpt2cupy import torch as ours  # noqa: E402
from gpt2cupy.errors import InputError  # noqa: E402
from gpt2cupy.ops import reference, reference_attention  # noqa: E402
from gpt2cupy.torch.launches import DTYPES as DTYPES_OF_TENSORS  # noqa: E402

functional = torch.nn.functional


def tables(device):
    return [torch.tensor(table, device=device) for table in ops.rope_tables(16, 8)]


def heads(x, size=8):
    return x.reshape(2, -1, 3, size)


# Every function on inputs x [2, 3, 8], weight [8]; how its results look.
CALLS = {
    "attention": lambda x, w: ours.attention(heads(x), heads(x), heads(x), True, q_offset=1),
    "decode_attention": lambda x, w: ours.decode_attention(
        x, heads(x), heads(x), torch.zeros(2, dtype=torch.int32, device=x.device)
    ),
    "rms_norm": lambda x, w: ours.rms_norm(x, w),
    "layer_norm": lambda x, w: ours.layer_norm(x, w, w),
    "add_rms_norm": lambda x, w: ours.add_rms_norm(x, x, w),
    "add_layer_norm": lambda x, w: ours.add_layer_norm(x, x, w, w),
    "gelu": lambda x, w: ours.gelu(x, "tanh"),
    "bias_gelu": lambda x, w: ours.bias_gelu(x, w),
    "silu_mul": lambda x, w: ours.silu_mul(x, x),
    "rope": lambda x, w: ours.rope(x, *tables(x.device)),
    "softmax": lambda x, w: ours.softmax(x),
    "lookup": lambda x, w: ours.lookup(torch.zeros(2, 3, dtype=torch.int64, device=x.device), x[0]),
    "sample_logits": lambda x, w: ours.sample_logits(x[0], seed=1),
    "linear": lambda x, w: ours.linear(x, torch.outer(w, w), w, activation="relu", residual=x),
    "ffn": lambda x, w: ours.ffn(x, torch.outer(w, w), w, torch.outer(w, w), w, residual=x),
}


def test_every_function_is_listed():
    functions = {name for name in ours.__all__ if name[0].islower()}
    assert functions == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_fake_results_have_the_shapes_of_the_reference(name):
    """As torch.compile traces them; no GPU is touched."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, w = torch.zeros(2, 3, 8), torch.zeros(8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Tensors of the meta device run the same fake implementations.
        found = CALLS[name](torch.empty(2, 3, 8, device="meta"), torch.empty(8, device="meta"))
    found = found if isinstance(found, tuple) else (found,)
    shape = {"sample_logits": (3,), "lookup": (2, 3, 8), "attention": (2, 1, 3, 8)}.get(
        name, tuple(x.shape)
    )
    dtype = torch.int32 if name == "sample_logits" else w.dtype
    assert [(tuple(y.shape), y.dtype) for y in found] == [(shape, dtype)] * len(found)
    assert len(found) == (2 if name.startswith("add_") else 1)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_the_cpu_are_refused_by_name(name):
    first = {"silu_mul": "gate", "sample_logits": "logits", "lookup": "ids"}
    first = first.get(name, "q" if "attention" in name else "x")
    with pytest.raises(InputError, match=f"^{first} is on the CPU") as caught:
        CALLS[name](torch.zeros(2, 3, 8), torch.zeros(8))
    assert (caught.value.remedy and name in caught.value.where) or name == "gelu"


@pytest.mark.parametrize("name", CALLS)
def test_odd_values_are_refused_by_name(name):
    """On the CPU nothing works, so each has to be an error of ours."""
    function = getattr(ours, name)
    kinds = {n: p.annotation for n, p in inspect.signature(function).parameters.items()}
    usual = {"Tensor": torch.zeros(2, 8), "Tensor | None": None, "int | Tensor": 0}
    usual |= {"float": 1e-5, "float | None": None, "bool": False, "int": 0, "str": "none"}
    usual |= {"str | None": None}
    for argument in kinds:
        for value in (*ODD, 1e400, 2**63, torch.zeros(2), torch.zeros((), dtype=torch.int64)):
            given = {n: usual[kind] for n, kind in kinds.items()} | {argument: value}
            with torch.no_grad(), pytest.raises(InputError) as caught:
                function(**given)
            assert caught.value.where and caught.value.remedy


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"rms_norm", "layer_norm", "sample_logits"}))
def test_a_gradient_that_is_not_there_is_refused(name):
    x = torch.zeros(2, 3, 8, requires_grad=True)
    with pytest.raises(InputError, match="needs a gradient"):
        CALLS[name](x, torch.zeros(8))
    with torch.no_grad(), pytest.raises(InputError, match="on the CPU"):
        CALLS[name](x, torch.zeros(8))


def test_gradients_are_registered_for_the_norms():
    x = torch.empty(2, 8, device="meta", requires_grad=True)
    w = torch.empty(8, device="meta", requires_grad=True)
    for y in (ours.rms_norm(x, w), ours.layer_norm(x, w, w)):
        assert y.requires_grad
        for gradient, of in zip(torch.autograd.grad(y.sum(), (x, w)), (x, w), strict=True):
            assert gradient.shape == of.shape
    half = torch.empty(8, device="meta", dtype=torch.float16, requires_grad=True)
    with pytest.raises(InputError, match="no gradient"):
        ours.rms_norm(x, half)


def test_modules_take_the_state_of_pytorchs():
    for mine, theirs in (
        (ours.RMSNorm(8), torch.nn.RMSNorm(8)),
        (ours.LayerNorm(8), torch.nn.LayerNorm(8)),
    ):
        torch.nn.init.normal_(theirs.weight)
        mine.load_state_dict(theirs.state_dict())
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        assert torch.equal(mine.weight, theirs.weight)
    with pytest.raises(InputError, match="last dimension"):
        ours.LayerNorm((2, 8))(torch.zeros(2, 8))


@pytest.mark.parametrize("name", CALLS)
def test_the_compiler_sees_one_operator(name):
    """However short the way around the dispatcher is: a graph must have the operator in it."""
    seen = []

    def backend(graph, inputs):
        seen.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
        return lambda *args: tuple(torch.zeros(1) for _ in range(2))

    torch._dynamo.reset()
    torch.compile(CALLS[name], backend=backend, fullgraph=True)(torch.ones(2, 3, 8), torch.ones(8))
    operator = getattr(torch.ops.gpt2cupy, "bias_gelu" if name == "gelu" else name).default
    assert operator in seen
    torch._dynamo.reset()


def test_transforms_see_the_operator_too():
    from torch.autograd import forward_ad

    from gpt2cupy.torch.operators import traced

    assert not traced()
    with forward_ad.dual_level():
        assert traced()
    found = []
    torch.func.vmap(lambda x: found.append(traced()) or x)(torch.ones(2, 3))
    assert found == [True]


def test_schemas_are_functional():
    for name in CALLS:
        operator = getattr(torch.ops.gpt2cupy, "bias_gelu" if name == "gelu" else name).default
        assert not operator._schema.is_mutable


def test_the_module_of_attention():
    made = ours.Attention(64, 8, 2)
    shapes = {name: tuple(p.shape) for name, p in made.state_dict().items() if "weight" in name}
    assert shapes == {
        "q_proj.weight": (64, 64),
        "k_proj.weight": (16, 64),
        "v_proj.weight": (16, 64),
        "o_proj.weight": (64, 64),
    }
    assert {*ours.Attention(64, 8, bias=False).state_dict()} == {*shapes}
    for sizes in ((60, 8), (64, 8, 3)):
        with pytest.raises(InputError, match="do not divide"):
            ours.Attention(*sizes)
    with pytest.raises(InputError, match="needs a gradient"):
        made(torch.zeros(1, 3, 64))
    with torch.no_grad():
        assert ours.Attention(64, 8, device="meta")(torch.empty(2, 5, 64, device="meta")).shape == (
            2, 5, 64,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# on a GPU


def on_gpu(*arrays):
    return [torch.tensor(np.asarray(a, np.float32), device="cuda") for a in arrays]


@pytest.fixture
def kind(dtype):
    return getattr(torch, dtype.name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("channels", [111, 768, 4096])
def test_norms_beside_pytorchs(dtype, kind, name, channels):
    rng = np.random.default_rng(0)
    x, w, b = draw(rng, (2, 5, channels), dtype), draw(rng, channels, dtype), None
    params = (w,) if name == "rms_norm" else (w, draw(rng, channels, dtype))
    exact = getattr(reference, name)(*(a.astype(np.float64) for a in (x, *params)))
    x, w, *b = (t.to(kind) for t in on_gpu(x, *params))
    mine = getattr(ours, name)(x, w, *b)
    eps = 1e-6 if name == "rms_norm" else 1e-5
    theirs = getattr(functional, name)(x, (channels,), w, *b, eps=eps)
    assert mine.dtype == kind
    check(mine.float().cpu().numpy(), theirs.float().cpu().numpy(), exact, dtype, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_every_function_is_the_op(name):
    rng = np.random.default_rng(0)
    x, w = on_gpu(draw(rng, (2, 3, 8)), draw(rng, 8))
    twice = [CALLS[name](x, w), CALLS[name](x + 0, w + 0)]  # the second finds the first's launches
    for found in twice:
        found = found[0] if isinstance(found, tuple) else found
        host = [x.cpu().numpy(), w.cpu().numpy()]
        expected = {
            "attention": lambda x, w: reference_attention.attention(*[heads(x)] * 3, True),
            "decode_attention": lambda x, w: np.zeros_like(x),  # no key counts
            "rms_norm": lambda x, w: reference.rms_norm(x, w),
            "layer_norm": lambda x, w: reference.layer_norm(x, w, w),
            "add_rms_norm": lambda x, w: reference.rms_norm(2 * x, w),
            "add_layer_norm": lambda x, w: reference.layer_norm(2 * x, w, w),
            "gelu": lambda x, w: reference.gelu(x, "tanh"),
            "bias_gelu": lambda x, w: reference.bias_gelu(x, w),
            "silu_mul": lambda x, w: reference.silu_mul(x, x),
            "rope": lambda x, w: reference.rope(x, *ops.rope_tables(16, 8)),
            "softmax": lambda x, w: reference.softmax(x),
            "lookup": lambda x, w: np.broadcast_to(x[0, 0], (2, 3, 8)),
            "sample_logits": lambda x, w: reference.sample_logits(x[0], seed=1),
            "linear": lambda x, w: reference.linear(
                x, np.outer(w, w), w, activation="relu", residual=x
            ),
            "ffn": lambda x, w: reference.ffn(x, np.outer(w, w), w, np.outer(w, w), w, residual=x),
        }[name](*host)
        np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_gradients_beside_pytorchs(dtype, kind, name):
    rng = np.random.default_rng(0)
    x, w, b, dy = (t.to(kind) for t in on_gpu(*(draw(rng, s) for s in ((7, 99), 99, 99, (7, 99)))))
    params = (w,) if name == "rms_norm" else (w, b)
    eps = 1e-6 if name == "rms_norm" else 1e-5
    found = []
    for function in (
        lambda x, *p: getattr(ours, name)(x, *p),
        lambda x, *p: getattr(functional, name)(x, (99,), *p, eps=eps),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, *params)]
        found.append(torch.autograd.grad(function(*leaves), leaves, dy))
    backward = getattr(reference, f"{name}_backward")
    exact = backward(*(t.double().cpu().numpy() for t in (dy, x, w)))
    for mine, theirs, true in zip(*found, exact, strict=True):
        check(mine.float().cpu().numpy(), theirs.float().cpu().numpy(), true, dtype, name)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Input #")  # that float64 would be finer
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_gradcheck(name):
    x = torch.randn(3, 8, device="cuda", requires_grad=True)
    params = [torch.randn(8, device="cuda", requires_grad=True) for _ in name.split("_")[:1]]
    if name == "layer_norm":
        params.append(torch.randn(8, device="cuda", requires_grad=True))
    # In float32, as the kernels compute: differences are coarse.
    assert torch.autograd.gradcheck(
        lambda *given: getattr(ours, name)(*given), (x, *params), eps=1e-2, atol=2e-2, rtol=2e-2
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "bias_gelu", "softmax", "silu_mul"])
def test_opcheck(name):
    x, w = torch.randn(2, 8, device="cuda"), torch.randn(8, device="cuda")
    args = {
        "rms_norm": (x, w, 1e-6),
        "add_rms_norm": (x, x.clone(), w, 1e-6),
        "bias_gelu": (x, w, "tanh"),
        "softmax": (x,),
        "silu_mul": (x, x.clone()),
    }[name]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.gpt2cupy, name).default, args, test_utils=checks)


@pytest.mark.gpu
def test_work_goes_to_pytorchs_current_stream():
    x, w = torch.randn(512, 4096, device="cuda"), torch.ones(4096, device="cuda")
    expected = ours.rms_norm(2 * x, w)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what follows must wait for it
        doubled = 2 * x
        found = ours.rms_norm(doubled, w)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_graph_and_the_compiler_take_it():
    x, w = torch.randn(4, 4096, device="cuda"), torch.randn(4096, device="cuda")
    with torch.inference_mode():
        expected = ours.rms_norm(x, w)
        compiled = torch.compile(lambda x, w: ours.rms_norm(x * 1.0, w) + 0.0, fullgraph=True)
        torch.testing.assert_close(compiled(x, w), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ours.rms_norm(x, w)
        x *= 3
        graph.replay()
        torch.testing.assert_close(y, ours.rms_norm(x, w))


@pytest.mark.gpu
def test_another_thread_has_launches_of_its_own():
    x, w = torch.randn(4, 768, device="cuda"), torch.randn(768, device="cuda")
    expected, found = ours.rms_norm(x, w), []
    thread = threading.Thread(target=lambda: found.append(ours.rms_norm(x, w)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.gpu
def test_tensors_in_two_places_are_refused_by_name():
    x, w = torch.ones(4, 8, device="cuda"), torch.ones(8, device="cuda")
    for _ in range(2):
        with pytest.raises(InputError, match="weight is on the CPU"):
            ours.rms_norm(x, w.cpu())
        with pytest.raises(InputError, match="x is on the CPU"):
            ours.rms_norm(x.cpu(), w)
        with pytest.raises(InputError, match="up is on the CPU"):
            ours.silu_mul(x, x.cpu())
        ours.rms_norm(x, w)
    if torch.cuda.device_count() > 1:
        with pytest.raises(InputError, match=r"weight is .* on device 1"):
            ours.rms_norm(x, w.to("cuda:1"))
        elsewhere = ours.rms_norm(x.to("cuda:1"), w.to("cuda:1"))
        assert elsewhere.get_device() == 1 and torch.cuda.current_device() == 0
        torch.testing.assert_close(elsewhere.cpu(), ours.rms_norm(x, w).cpu())


@pytest.mark.gpu
def test_what_a_kernel_cannot_take_is_refused():
    x, w = torch.ones(4, 8, device="cuda"), torch.ones(8, device="cuda")
    with pytest.raises(InputError, match=r"torch\.float64"):
        ours.rms_norm(x.double(), w.double())
    with pytest.raises(InputError, match="weight is"):
        ours.rms_norm(x, w[:3])
    with pytest.raises(InputError, match="x is"):
        ours.rms_norm(x.T, torch.ones(4, device="cuda"))
    with pytest.raises(InputError, match="x is"):
        ours.rms_norm(torch.ones(33, device="cuda")[1:].view(4, 8), w)
    assert ours.rms_norm(x[:0], w).shape == (0, 8)
    both = torch.randn(3, 16, device="cuda")
    torch.testing.assert_close(
        ours.silu_mul(both[:, :8], both[:, 8:]), functional.silu(both[:, :8]) * both[:, 8:]
    )


def test_dtypes_are_those_of_the_kernels():
    assert {str(d).removeprefix("torch.") for d in DTYPES_OF_TENSORS} >= set(DTYPES)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("queries, keys", [(99, 150), (128, 256)])
def test_attention_is_pytorchs(kind, dtype, layout, queries, keys):
    torch.manual_seed(0)
    shapes = (2, queries, 4, 64), (2, keys, 2, 64), (2, keys, 2, 64)
    q, k, v = (torch.randn(shape, device="cuda").to(kind) for shape in shapes)
    if layout == "heads":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    theirs = functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    exact = reference_attention.attention(*(t.double().cpu().numpy() for t in (q, k, v)), True)
    mine = ours.attention(q, k, v, True)
    # Found again, with the tensors elsewhere.
    assert torch.equal(
        ours.attention(*(t.clone(memory_format=torch.preserve_format) for t in (q, k, v)), True),
        mine,
    )
    check(mine.double().cpu().numpy(), theirs.double().cpu().numpy(), exact, dtype, "attention")
    lengths = torch.tensor([keys, 19], dtype=torch.int32, device="cuda")
    exact = reference_attention.decode_attention(
        *(t.double().cpu().numpy() for t in (q[:, 0], k, v)), lengths.cpu().numpy()
    )
    baseline = reference_attention.decode_attention(
        *(t.float().cpu().numpy() for t in (q[:, 0], k, v)), lengths.cpu().numpy()
    ).astype(dtype)
    one = ours.decode_attention(q[:, 0], k, v, lengths)
    check(one.double().cpu().numpy(), baseline, exact, dtype, "decode_attention")
    compiled = torch.compile(lambda q, k, v: ours.attention(q, k, v, True), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), mine)


@pytest.mark.gpu
def test_a_captured_graph_follows_lengths():
    q, k, v = (torch.randn(2, 9, 4, 64, device="cuda", dtype=torch.float16) for _ in "qkv")
    lengths = torch.full((2,), 9, dtype=torch.int32, device="cuda")

    def call():
        whole = ours.attention(q, k, v, lengths=lengths)
        return whole, ours.decode_attention(q[:, 0], k, v, lengths)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    lengths[1] = 4
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, call(), strict=True))
    module = ours.Attention(256, 4, 2, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        assert torch.isfinite(module(torch.randn(2, 9, 256, device="cuda").half())).all()
