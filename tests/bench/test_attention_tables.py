"""Tables of bench/attention.py: a result outside the error rule has no speed."""

from __future__ import annotations

import pytest

from bench.report import attention_tables

ERRORS = {"max_error": 1e-3, "mean_error": 1e-5, "rms_error": 2e-5}


def side(us, **more):
    ways = ("python", "gpu_warm", "gpu_cold")
    return ERRORS | {way: None if us is None else {"p50_us": us} for way in ways} | more


def record(ours=50.0):
    inside = ours is not None
    sequence = {
        "kind": "sequence", "dtype": "float16", "tokens": 2048, "causal": True, "flops": 10**10,
        "best": "cudnn", "sdpa": {"cudnn": side(100.0), "flash": side(200.0)},
        "ours": side(ours, inside=inside), "ours_torch": side(ours, inside=inside),
        "memory": {"materialised": 1000, "ours": 125},
    }  # fmt: skip
    token = {
        "kind": "token", "dtype": "float16", "cache": [1, 4096, 64, 8, 128], "bytes": 10**8,
        "sdpa": ERRORS | {"gpu": {"p50_us": 40.0}}, "read": {"p50_us": 25.0},
        "ours": ERRORS | {"gpu": None if ours is None else {"p50_us": 27.0}, "inside": inside},
    }  # fmt: skip
    results = {"heads": 32, "head_size": 128, "rows": [sequence, token], "skipped": {}}
    return {"results": results, "command": "bench/attention.py", "complete": True}


def cells(made):
    return [cell.strip() for cell in made.splitlines()[2].strip("|").split("|")]


def test_speed_errors_and_rate():
    entry = record()
    line = cells(attention_tables.speeds(entry))
    assert line == [
        "2,048", "float16", "causal", "cudnn", "0.100", "0.050", "2.00", "2.00", "2.00", "2.00",
        "87.5",
    ]  # fmt: skip
    assert cells(attention_tables.correctness(entry))[-1] == "yes"
    assert cells(attention_tables.rates(entry))[-2:] == ["100.0", "200.0"]
    line = cells(attention_tables.decode(entry))
    assert line[:5] == ["1", "4,096", "64", "8", "128"]
    assert line[6:12] == ["100", "40.0", "27.0", "25.0", "0.93", "3704"]


@pytest.mark.parametrize("made", ["speeds", "rates", "decode"])
def test_what_is_outside_the_rule_has_no_speed(made):
    line = cells(getattr(attention_tables, made)(record(None)))
    assert "-" in line and "50.0" not in line
    assert cells(attention_tables.correctness(record(None)))[-1] == "no"
