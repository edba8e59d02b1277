"""Drafts of a text: those that stand, those proposed next, and rows that see each other."""

from __future__ import annotations

import numpy as np
import pytest
from builders import host
from error_rule import check
from op_checks import draw, on, wide

from gpt2cupy import ops
from gpt2cupy.ops import reference
from gpt2cupy.ops.sampling import RING_ENTRY

M, Q = 4, 8


def a_step(rng, rows, tokens, room=300):
    """A text of few kinds of tokens, drafts that were fed, and what was sampled after each."""
    history = np.full(room, -7, np.int32)
    history[: tokens - 1] = rng.integers(0, 3, tokens - 1)
    ids = rng.integers(0, 3, M).astype(np.int32)
    ids[rows:] = -1
    positions = np.arange(tokens - 1, tokens - 1 + M, dtype=np.int32)
    chosen = np.zeros((rows, 1, RING_ENTRY.itemsize), np.uint8)
    entries = chosen.view(RING_ENTRY)[:, 0, 0]
    entries["id"] = rng.integers(0, 3, rows)
    stand = rng.integers(0, rows)  # at least so many
    entries["id"][:stand] = ids[1 : stand + 1]
    entries["logprob"] = -rng.random(rows)
    steps = rng.integers(0, 20, M).astype(np.uint32)
    ring = np.zeros((M, Q, RING_ENTRY.itemsize), np.uint8)
    return ids, positions, np.zeros(M, np.int32), chosen, history, steps, ring


def test_drafts_that_were_sampled_stand(xp):
    rng = np.random.default_rng(0)
    for turn in range(60):
        rows, tokens = (1, 2, 4)[turn % 3], int(rng.integers(1, 290))
        expected = a_step(rng, rows, tokens)
        found = [each.copy() if xp is np else xp.asarray(each) for each in expected]
        first, fed = tokens - 1, expected[0].copy()
        sampled = expected[3].view(RING_ENTRY)[:, 0, 0]["id"].tolist()
        reference.accept_drafts(*expected)
        ops.accept_drafts(*found)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(host(ours), theirs)
        count = 1
        while count < rows and fed[count] == sampled[count - 1]:
            count += 1
        ids, positions, *_, history, _, _ = expected
        assert history[first] == fed[0]
        assert history[first + 1 : first + 1 + count].tolist() == sampled[:count]
        assert (ids[0], positions[0]) == (sampled[count - 1], first + count)


def test_drafts_are_what_followed_before(xp):
    rng = np.random.default_rng(4)
    for turn in range(60):
        tokens, rows = int(rng.integers(1, 300)), (2, 4)[turn % 2]
        history = np.full(300, -7, np.int32)
        history[: tokens - 1] = rng.integers(0, 2 + turn % 9, tokens - 1)
        ids = rng.integers(0, 3, rows).astype(np.int32)
        positions = np.arange(tokens - 1, tokens - 1 + rows, dtype=np.int32)
        text = [*history[: tokens - 1].tolist(), int(ids[0])]
        expected = [ids.copy(), positions, history.copy()]
        found = [
            each.copy() if xp is np else xp.asarray(each) for each in (ids, positions, history)
        ]
        reference.propose_drafts(*expected)
        ops.propose_drafts(*found)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(host(ours), theirs)
        assert expected[2][:tokens].tolist() == text
        drafts = expected[0][1:].tolist()
        alike = [end for end in range(1, tokens - 1) if text[end - 1 : end + 1] == text[-2:]]
        assert (drafts == [-1] * (rows - 1)) == (not alike)
        assert not alike or drafts[0] in {text[end + 1] for end in alike}


@pytest.mark.parametrize("first", [293, 296, 299, 1000])
def test_a_text_that_runs_on_past_its_room_writes_nothing_there(xp, first):
    rng = np.random.default_rng(1)
    ids, positions, *rest = a_step(rng, 4, 290)
    positions += first - 289
    arrays = [xp.asarray(each.copy()) for each in (ids, positions, *rest)]
    expected = [each.copy() for each in (ids, positions, *rest)]
    reference.accept_drafts(*expected)
    ops.accept_drafts(*arrays)
    for each in (expected, arrays):
        propose = reference.propose_drafts if each is expected else ops.propose_drafts
        propose(each[0], each[1], each[4])
    for ours, theirs in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(host(ours), theirs)


@pytest.mark.parametrize("head_size", [64, 19])
def test_rows_of_one_slot_see_each_other(xp, dtype, head_size):
    rng = np.random.default_rng(2)
    heads, rows, past = 3, 4, 37
    qkv = draw(rng, (rows, 3 * heads * head_size), dtype)
    k, v = (draw(rng, (2, heads, 50, head_size), dtype) for _ in range(2))
    k[1, :, past:] = v[1, :, past:] = np.nan
    slots = np.ones(rows, np.int32)
    positions = np.arange(past, past + rows, dtype=np.int32)
    prompt = [np.array(each, np.int32) for each in ([0, rows], [1], [past])]
    baseline = reference.attention_prefill(qkv, k.copy(), v.copy(), *prompt, rows, 0.2)
    exact = reference.attention_prefill(*wide(qkv, k, v), *prompt, rows, 0.2)
    arrays = on(xp, qkv, k.copy(), v.copy(), slots, positions)
    ops.store_kv(*arrays)
    ours = ops.attention_decode(*arrays, 0.2)
    check(host(ours), baseline, exact, dtype, f"rows of one slot, heads of {head_size}")
    new = host(qkv).reshape(rows, 3, heads, head_size)
    for part, cache in ((1, arrays[1]), (2, arrays[2])):
        stored = host(cache)[1, :, past : past + rows].transpose(1, 0, 2)
        np.testing.assert_array_equal(stored, new[:, part])


def test_rows_without_a_place_are_not_stored(xp, dtype):
    rng = np.random.default_rng(3)
    qkv, k = draw(rng, (3, 3 * 32), dtype), draw(rng, (1, 1, 4, 32), dtype)
    kx, vx = on(xp, k.copy(), k.copy())
    slots, positions = np.array([-1, 0, 0], np.int32), np.array([0, 4, -1], np.int32)
    ops.store_kv(xp.asarray(qkv), kx, vx, xp.asarray(slots), xp.asarray(positions))
    np.testing.assert_array_equal(host(kx), k)
    np.testing.assert_array_equal(host(vx), k)
