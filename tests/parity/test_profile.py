"""The Hugging Face baseline computes what it times."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from gpt2cupy.profile import components
from gpt2cupy.record import ROOT


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = ROOT / "bench" / "peers"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("profile_hf", folder / "profile_hf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    monkeypatch.undo()


@pytest.fixture
def baseline(peer):
    config = peer.transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager"
    )
    config._attn_implementation = "eager"

    def load():
        peer.torch.manual_seed(0)
        return peer.transformers.GPT2LMHeadModel(config).eval()

    return load


def test_timed_attention_is_the_same_attention(peer, baseline):
    torch, model = peer.torch, baseline()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        wanted = model(ids, use_cache=True)
        step = model(torch.tensor([[9]]), past_key_values=wanted.past_key_values).logits
        clock = peer.Clock(torch.device("cpu"))
        peer.on_attention(model, clock)
        got = model(ids, use_cache=True)
        got_step = model(torch.tensor([[9]]), past_key_values=got.past_key_values).logits
    torch.testing.assert_close(got.logits, wanted.logits)
    torch.testing.assert_close(got_step, step)
    assert list(clock.milliseconds()) == list(peer.ATTENTION)


def test_the_baseline_has_the_same_tables(peer, baseline):
    args = SimpleNamespace(warmup=1, runs=2, tokens=3, batch=1)
    runs = peer.Runs(baseline, peer.torch.tensor([[3, 1, 4]]), args)
    tables = peer.components(runs)["tables"]
    assert list(tables) == list(components.TABLES)
    for name, rows in tables.items():
        assert {row["count"] for row in rows} == {6 if name == "model" else 12}
        assert sum(row["percent"] for row in rows) == pytest.approx(100)
    parts = {part for row in components.COVERS.values() for part in row}
    own = {row for rows in components.TABLES.values() for row in rows}
    assert {row["component"] for row in tables["attention"]} <= parts | own


def test_the_operator_table(peer, baseline):
    table = peer.operators(baseline(), peer.torch.tensor([[3, 1, 4]]), 4)
    rows = {row["name"]: row for row in table["rows"]}
    assert rows["aten::addmm"]["calls"] == 4 * 2 * 4  # tokens, layers, products
    assert rows["aten::addmm"]["self_cuda_ms"] is None and table["idle_percent"] is None
    assert sum(r["self_cpu_ms"] for r in table["rows"]) == pytest.approx(table["self_cpu_total_ms"])
