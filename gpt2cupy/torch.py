"""The row ops on PyTorch's CUDA tensors: without a copy, on PyTorch's current stream.

    import gpt2cupy.torch as ours
    y = ours.rms_norm(x, weight)

Each function is an operator of ``torch.ops.gpt2cupy`` with a fake implementation, so that
``torch.compile`` and CUDA graphs take it. ``rms_norm`` and ``layer_norm`` can be
differentiated; where a gradient is asked of another, it raises. CuPy must be installed: it
compiles and launches the kernels. This is the only module that imports PyTorch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from . import ops
from .errors import InputError
from .ops import norm_backward
from .ops.core.device import cupy_module
from .ops.core.tape import Prepared, recorded

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "add_layer_norm",
    "add_rms_norm",
    "bias_gelu",
    "gelu",
    "layer_norm",
    "lookup",
    "rms_norm",
    "rope",
    "sample_logits",
    "silu_mul",
    "softmax",
]

_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}
_PLAIN = (Tensor, torch.nn.Parameter)
_KNOWN = 4096  # signatures that a thread remembers
_library: Any = torch.library.Library("gpt2cupy", "DEF")  # type: ignore[no-untyped-call]


class _Programs(threading.local):
    """Launches that this thread has checked, by what the checks rest on."""

    def __init__(self) -> None:
        self.known: dict[Any, list[tuple[Prepared, tuple[int, ...]]]] = {}


_programs = _Programs()


def _run(
    name: str, call: Callable[..., Any], tensors: tuple[Tensor | None, ...], *rest: Any
) -> None:
    """``call`` of :mod:`gpt2cupy.ops` on tensors, followed by what else it takes.

    The first time it runs on CuPy arrays over the tensors' memory, and its launches are kept; a
    call with tensors of the same shapes, strides, dtypes and device only changes their pointers.
    The first tensor is never None.
    """
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return _run(name, call, tensors, *rest)
    facts: list[Any] = [name, rest]
    pointers, bits = [], 0
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
            pointers.append(0)
            continue
        shape = tensor.shape
        layout = shape if tensor.is_contiguous() else (shape, tensor.stride())
        facts += (layout, tensor.dtype, tensor.get_device())
        pointer = tensor.data_ptr()
        pointers.append(pointer)
        bits |= pointer
    pointers.append(0)  # the last: of an array that no tensor is
    key = tuple(facts)
    program = _programs.known.get(key)
    if program is None or bits % 16:
        program = _checked(call, tensors, rest, device)
        if len(_programs.known) >= _KNOWN:
            _programs.known.clear()
        if not bits % 16:
            _programs.known[key] = program
    stream = torch._C._cuda_getCurrentRawStream(device)
    for prepared, places in program:
        prepared.run_on(stream, [pointers[place] for place in places])
    return None


def _checked(
    call: Callable[..., Any], tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], device: int
) -> list[tuple[Prepared, tuple[int, ...]]]:
    """The launches of ``call``, checked, and for each array of theirs the tensor it is."""
    # This thread may not have touched the GPU yet: setting its device gives it the context.
    cupy_module().cuda.runtime.setDevice(device)
    views = [None if tensor is None else _view(tensor) for tensor in tensors]
    with recorded() as calls:
        call(*views, *rest)
    launches: list[Any] = calls
    places = {id(view): place for place, view in enumerate(views) if view is not None}
    program = []
    for launch in launches:
        launch.load()
        prepared = Prepared(launch, device)
        taken = launch.values[: prepared.arrays]
        program.append((prepared, tuple(places.get(id(value), -1) for value in taken)))
    return program


def _view(tensor: Tensor) -> Any:
    """A CuPy array over a tensor's memory."""
    import cupy

    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InputError(
            f"kernels take no tensors of {tensor.dtype}",
            where="gpt2cupy.torch",
            remedy=f"Use {', '.join(str(known).removeprefix('torch.') for known in _DTYPES)}.",
        )
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    last = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + dtype.itemsize
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), max(last, 1), tensor, tensor.get_device())
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    return cupy.ndarray(tuple(tensor.shape), dtype, pointer, strides)


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as an operator on CUDA tensors; on others it is refused by name."""
    name = schema.partition("(")[0]

    def register(implementation: Callable[..., Any]) -> Any:
        _library.define(schema, tags=(torch.Tag.needs_exact_strides,))
        _library.impl(name, implementation, "CUDA")
        _library.impl(name, lambda *args: _refuse_host(name, args), "CPU")
        torch.library.register_fake(f"gpt2cupy::{name}", fake, lib=_library)
        operator = getattr(torch.ops.gpt2cupy, name).default

        def call(*args: Any) -> Any:
            if _direct(*[given for given in args if isinstance(given, Tensor)]):
                return implementation(*args)
            return operator(*args)

        return call

    return register


def _refuse_host(name: str, args: tuple[Any, ...]) -> None:
    schema = getattr(torch.ops.gpt2cupy, name).default._schema
    for parameter, given in zip(schema.arguments, args, strict=False):
        if isinstance(given, Tensor) and given.device.type == "cpu":
            raise InputError(
                f"{parameter.name} is on the CPU",
                where=f"gpt2cupy.torch.{name}",
                remedy="Nothing is copied silently: move it to the GPU, or give gpt2cupy.ops a "
                "NumPy array.",
            )


def _refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    """Raise where autograd would want a gradient that no kernel computes."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise InputError(
            "an input needs a gradient, and this op has none",
            where=f"gpt2cupy.torch.{name}",
            remedy="Call it under torch.no_grad(), or detach the inputs.",
        )


def _direct(*tensors: Tensor | None) -> bool:
    """Whether a call can do without PyTorch's dispatcher, which takes longer than a launch.

    It can where nobody would see it there: plain tensors on a GPU, no tracing, no gradient.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    graded = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not tensor.is_cuda:
            return False
        if (graded and tensor.requires_grad) or torch._C._functorch.is_functorch_wrapped_tensor(
            tensor
        ):
            return False
    return True


def _like(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What a norm of x is written to."""
    if (weight is None or weight.dtype == x.dtype) and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=(x if weight is None else weight).dtype, device=x.device)


# ---------------------------------------------------------------------------------------------
# norms


@_operator(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    lambda x, weight, eps: _like(x, weight),
)
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out = _like(x, weight)
    _run("rms_norm", lambda x, w, out, eps: ops.rms_norm(x, w, eps, out=out), (x, weight, out), eps)
    return out


@_operator(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    lambda x, weight, bias, eps: _like(x, weight),
)
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    def call(x: Any, w: Any, b: Any, out: Any, eps: float) -> None:
        ops.layer_norm(x, w, b, eps, out=out)

    out = _like(x, weight)
    _run("layer_norm", call, (x, weight, bias, out), eps)
    return out


@_operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: (_like(x, weight), _like(residual)),
)
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    def call(x: Any, residual: Any, w: Any, y: Any, total: Any, eps: float) -> None:
        ops.add_rms_norm(x, residual, w, eps, out=(y, total))

    y, total = _like(x, weight), _like(residual)
    _run("add_rms_norm", call, (x, residual, weight, y, total), eps)
    return y, total


@_operator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor)",
    lambda x, residual, weight, bias, eps: (_like(x, weight), _like(residual)),
)
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    def call(x: Any, residual: Any, w: Any, b: Any, y: Any, total: Any, eps: float) -> None:
        ops.add_layer_norm(x, residual, w, b, eps, out=(y, total))

    y, total = _like(x, weight), _like(residual)
    _run("add_layer_norm", call, (x, residual, weight, bias, y, total), eps)
    return y, total


def _parameter_gradient(x: Tensor) -> Tensor:
    return torch.empty(x.shape[-1:], dtype=x.dtype, device=x.device)


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, centred: bool) -> Any:
    channels = x.shape[-1] if x.dim() else 0
    rows = x.numel() // channels if channels else 0
    dx, dweight = _like(x), _parameter_gradient(x)
    dbias = _parameter_gradient(x) if centred else None
    stats = torch.empty((rows, 2), dtype=torch.float32, device=x.device)
    groups = (norm_backward.groups_of(rows), 2, channels)
    partials = torch.empty(groups, dtype=torch.float32, device=x.device)
    tensors = (dy, x, weight, dx, dweight, dbias, stats, partials)
    _run("norm_backward", norm_backward.backward, tensors, eps)
    return (dx, dweight, dbias) if centred else (dx, dweight)


@_operator(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    lambda dy, x, weight, eps: (_like(x), _parameter_gradient(x)),
)
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _norm_backward(dy, x, weight, eps, False)


@_operator(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dy, x, weight, eps: (_like(x), _parameter_gradient(x), _parameter_gradient(x)),
)
def _layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_backward(dy, x, weight, eps, True)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *_, eps = inputs
    if weight is not None and weight.dtype != x.dtype:
        raise InputError(
            f"x is {x.dtype} and weight {weight.dtype}, of which there is no gradient",
            where="gpt2cupy.torch: norm",
            remedy="Give both in one dtype, or call it under torch.no_grad().",
        )
    ctx.save_for_backward(x, weight)
    ctx.eps = eps


# The gradient that autograd hands over may have any strides, a sum's even 0: it is copied then.
def _rms_norm_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dy.contiguous(), x, weight, ctx.eps)
    return dx, None if weight is None else dweight, None


def _layer_norm_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _layer_norm_backward(dy.contiguous(), x, weight, ctx.eps)
    bias = dbias if ctx.needs_input_grad[2] else None
    return dx, None if weight is None else dweight, bias, None


for _name, _gradient in (("rms_norm", _rms_norm_gradient), ("layer_norm", _layer_norm_gradient)):
    torch.library.register_autograd(
        f"gpt2cupy::{_name}", _gradient, setup_context=_keep, lib=_library
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """:func:`gpt2cupy.ops.rms_norm` of tensors; differentiable."""
    return _rms_norm(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """:func:`gpt2cupy.ops.layer_norm` of tensors; differentiable."""
    return _layer_norm(x, weight, bias, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`gpt2cupy.ops.add_rms_norm` of tensors; has no gradient."""
    _refuse_gradient("add_rms_norm", x, residual, weight)
    return _add_rms_norm(x, residual, weight, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`gpt2cupy.ops.add_layer_norm` of tensors; has no gradient."""
    _refuse_gradient("add_layer_norm", x, residual, weight, bias)
    return _add_layer_norm(x, residual, weight, bias, eps)


# ---------------------------------------------------------------------------------------------
# activations, rotary embedding, softmax, lookup, sampling


@_operator(
    "bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor",
    lambda x, bias, approximate: _like(x),
)
def _bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    def call(x: Any, bias: Any, out: Any, approximate: str) -> None:
        ops.bias_gelu(x, bias, approximate, out=out)

    out = _like(x)
    _run("bias_gelu", call, (x, bias, out), approximate)
    return out


@_operator("silu_mul(Tensor gate, Tensor up) -> Tensor", lambda gate, up: _like(gate))
def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    out = _like(gate)
    _run("silu_mul", lambda gate, up, out: ops.silu_mul(gate, up, out=out), (gate, up, out))
    return out


@_operator(
    "rope(Tensor x, Tensor cosines, Tensor sines, Tensor? positions, bool interleaved) -> Tensor",
    lambda x, cosines, sines, positions, interleaved: _like(x),
)
def _rope(
    x: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    def call(x: Any, cos: Any, sin: Any, positions: Any, out: Any, interleaved: bool) -> None:
        ops.rope(x, cos, sin, positions, interleaved=interleaved, out=out)

    out = _like(x)
    _run("rope", call, (x, cosines, sines, positions, out), interleaved)
    return out


@_operator("softmax(Tensor x) -> Tensor", _like)
def _softmax(x: Tensor) -> Tensor:
    out = _like(x)
    _run("softmax", lambda x, out: ops.softmax(x, out=out), (x, out))
    return out


def _rows_of(ids: Tensor, table: Tensor) -> Tensor:
    return torch.empty((*ids.shape, table.shape[-1]), dtype=table.dtype, device=table.device)


@_operator("lookup(Tensor ids, Tensor table) -> Tensor", _rows_of)
def _lookup(ids: Tensor, table: Tensor) -> Tensor:
    out = _rows_of(ids, table)
    _run("lookup", lambda ids, table, out: ops.lookup(ids, table, out=out), (ids, table, out))
    return out


def _ids_of(logits: Tensor, *settings: Any) -> Tensor:
    return torch.empty(logits.shape[:1], dtype=torch.int32, device=logits.device)


@_operator(
    "sample_logits(Tensor logits, Tensor? positions, float temperature, int top_k, float top_p, "
    "float min_p, int seed) -> Tensor",
    _ids_of,
)
def _sample_logits(logits: Tensor, positions: Tensor | None, *settings: Any) -> Tensor:
    def call(logits: Any, positions: Any, out: Any, scratch: Any, *settings: Any) -> None:
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        options = dict(zip(names, settings, strict=True))
        ops.sample_logits(logits, positions, **options, out=out, scratch=scratch)

    out = _ids_of(logits)
    scratch = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _run("sample_logits", call, (logits, positions, out, scratch), *settings)
    return out


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """:func:`gpt2cupy.ops.gelu` of a tensor; has no gradient."""
    _refuse_gradient("gelu", x)
    return _bias_gelu(x, None, approximate)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """:func:`gpt2cupy.ops.bias_gelu` of tensors; has no gradient."""
    _refuse_gradient("bias_gelu", x, bias)
    return _bias_gelu(x, bias, approximate)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`gpt2cupy.ops.silu_mul` of tensors; has no gradient."""
    _refuse_gradient("silu_mul", gate, up)
    return _silu_mul(gate, up)


def rope(
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """:func:`gpt2cupy.ops.rope` of tensors; has no gradient."""
    _refuse_gradient("rope", x, cosines, sines)
    return _rope(x, cosines, sines, positions, interleaved)


def softmax(x: Tensor) -> Tensor:
    """:func:`gpt2cupy.ops.softmax` of a tensor, over its last dimension; has no gradient."""
    _refuse_gradient("softmax", x)
    return _softmax(x)


def lookup(ids: Tensor, table: Tensor) -> Tensor:
    """:func:`gpt2cupy.ops.lookup` of tensors; has no gradient."""
    _refuse_gradient("lookup", table)
    return _lookup(ids, table)


def sample_logits(
    logits: Tensor,
    positions: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """:func:`gpt2cupy.ops.sample_logits` of tensors; seeds up to 2^63."""
    return _sample_logits(logits.detach(), positions, temperature, top_k, top_p, min_p, seed)


# ---------------------------------------------------------------------------------------------
# modules


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the last dimension, its state dict too, by our kernel."""

    def forward(self, x: Tensor) -> Tensor:
        _refuse_shape(self.normalized_shape)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps)


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension, its state dict too, by our kernel."""

    def forward(self, x: Tensor) -> Tensor:
        _refuse_shape(self.normalized_shape)
        return layer_norm(x, self.weight, self.bias, self.eps)


def _refuse_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise InputError(
            f"kernels normalise the last dimension, not {list(shape)}",
            where="gpt2cupy.torch: normalized_shape",
            remedy="Flatten these dimensions, or take PyTorch's own module.",
        )
