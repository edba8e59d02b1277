"""Attention against its float64 reference, on NumPy and on the GPU, by the error rule."""

from __future__ import annotations

import numpy as np
import pytest
from builders import host
from op_checks import SEEDS, check_together, draw, on, torch_with_gpu, wide

from gpt2cupy import ops
from gpt2cupy.ops import cached_attention, reference
from gpt2cupy.ops.core import device


def cache_pair(rng, dtype, slots, heads, capacity, head_size, lengths):
    """A cache whose filled part is random and whose rest is NaN: an over-read shows."""
    shape = (slots, heads, capacity, head_size)
    k, v = draw(rng, shape, dtype), draw(rng, shape, dtype)
    for slot in range(slots):
        k[slot, :, lengths.get(slot, 0) :] = np.nan
        v[slot, :, lengths.get(slot, 0) :] = np.nan
    return k, v


def attention_baseline(xp, qkv, k, v, starts, slots, past, scale):
    """PyTorch's attention on the GPU under test where it is installed; else ours on NumPy."""
    if xp is np or not (torch := torch_with_gpu()):
        counts = np.diff(starts)
        rows = [np.asarray(a, np.int32) for a in (starts, slots, past)]
        return reference.attention_prefill(qkv, k.copy(), v.copy(), *rows, max(counts), scale)
    heads, head_size = k.shape[1], k.shape[3]
    found = []
    for row, slot in enumerate(slots):
        new = qkv[starts[row] : starts[row + 1]].reshape(-1, 3, heads, head_size)
        q, new_k, new_v = new.transpose(1, 2, 0, 3)
        first, count = int(past[row]), len(new)
        keys = np.concatenate([k[slot, :, :first], new_k], axis=1)
        values = np.concatenate([v[slot, :, :first], new_v], axis=1)
        visible = np.arange(first + count) <= np.arange(first, first + count)[:, None]
        kind = getattr(torch, qkv.dtype.name)
        q, keys, values = (
            torch.tensor(a.astype(np.float32), device="cuda").to(kind) for a in (q, keys, values)
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], keys[None], values[None], torch.tensor(visible, device="cuda"), scale=scale
        )
        found.append(out[0].transpose(0, 1).reshape(count, -1).float().cpu().numpy())
    return np.concatenate(found)


HEAD_SIZES = [1, 8, 16, 32, 59, 64, 80, 96, 128]


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("position", [0, 1, 31, 32, 255, 300, 1023])
def test_attention_decode(xp, dtype, head_size, position):
    attention_decode_case(xp, dtype, head_size, position)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("position", [0, 32, 300])
def test_attention_decode_by_fewer_blocks(dtype, split, position, monkeypatch):
    import cupy

    if not device.has_clusters():
        pytest.skip("one block is all there is on this chip")
    monkeypatch.setattr(cached_attention, "_split", lambda heads: split)
    attention_decode_case(cupy, dtype, 64, position)


@pytest.mark.gpu
@pytest.mark.parametrize("full", [0, 1])  # 2 warps a block and 4, on tensor cores
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("position", [0, 15, 16, 31, 63, 64, 127, 128, 300])
def test_attention_decode_of_many_rows(dtype, full, head_size, position, monkeypatch):
    import cupy

    monkeypatch.setattr(cached_attention, "_MANY_PER_SM", 0)
    monkeypatch.setattr(cached_attention, "_FULL_PER_SM", full)
    attention_decode_case(cupy, dtype, head_size, position)


def attention_decode_case(xp, dtype, head_size, position):
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        heads = 3
        qkv = draw(rng, (2, 3 * heads * head_size), dtype)
        k, v = cache_pair(rng, dtype, 3, heads, 1024, head_size, {2: position, 0: 5})
        slots, positions = np.array([2, 0], np.int32), np.array([position, 5], np.int32)
        args = (slots, positions, head_size**-0.5)
        exact = reference.attention_decode(*wide(qkv, k, v), *args)
        baseline = attention_baseline(xp, qkv, k, v, [0, 1, 2], slots, positions, args[2])
        kx, vx = on(xp, k, v)
        ours = ops.attention_decode(xp.asarray(qkv), kx, vx, *on(xp, slots, positions), args[2])
        found.append((host(ours), baseline, exact))
        new = qkv.reshape(2, 3, heads, head_size)
        np.testing.assert_array_equal(host(kx)[2, :, position], new[0, 1])
        np.testing.assert_array_equal(host(vx)[0, :, 5], new[1, 2])
    check_together(found, dtype, f"decode {head_size}")


def test_attention_decode_leaves_idle_and_full_rows_alone(xp, dtype):
    rng = np.random.default_rng(0)
    qkv = draw(rng, (2, 3 * 64), dtype)
    k = draw(rng, (1, 1, 4, 64), dtype)
    kx, vx = on(xp, k, k)
    rows = on(xp, np.array([-1, 0], np.int32), np.array([0, 4], np.int32))
    out = ops.attention_decode(xp.asarray(qkv), kx, vx, *rows, 0.125)
    assert not host(out).any()
    np.testing.assert_array_equal(host(kx), k)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("lengths", [(1,), (5, 70), (64, 33, 1), (200,)])
@pytest.mark.parametrize("past", [0, 37, 300])
def test_attention_prefill(xp, dtype, head_size, lengths, past):
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        found.append(prefill_case(xp, rng, dtype, head_size, lengths, past))
    check_together(found, dtype, f"prefill {head_size}")


def prefill_case(xp, rng, dtype, head_size, lengths, past):
    """One packed prompt: (ours, baseline, exact), with the cache it leaves compared."""
    heads, total = 2, sum(lengths)
    qkv = draw(rng, (total, 3 * heads * head_size), dtype)
    slots = np.arange(len(lengths), dtype=np.int32)[::-1].copy()
    before = {int(slot): past for slot in slots}
    k, v = cache_pair(rng, dtype, len(lengths), heads, 520, head_size, before)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = (starts, slots, np.full(len(lengths), past, np.int32))
    rest = (max(lengths), head_size**-0.5)
    exact = reference.attention_prefill(*wide(qkv, k, v), *rows, *rest)
    baseline = attention_baseline(xp, qkv, k, v, *rows, rest[1])
    kx, vx = on(xp, k, v)
    ours = ops.attention_prefill(xp.asarray(qkv), kx, vx, *on(xp, *rows), *rest)
    new = qkv.reshape(total, 3, heads, head_size)
    last = slots[-1]
    begin = starts[-2]
    np.testing.assert_array_equal(
        host(kx)[last, :, past : past + lengths[-1]], new[begin:, 1].transpose(1, 0, 2)
    )
    return host(ours), baseline, exact
