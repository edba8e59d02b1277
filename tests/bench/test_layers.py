"""The layers of bench/layers.py: ours on the references, and those of PyTorch beside them."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from gpt2cupy import ops
from gpt2cupy.record import ROOT

sys.path.insert(0, str(ROOT / "bench"))
sys.path.insert(0, str(ROOT / "bench" / "peers"))
import layer_models
import layers

SMALL = layer_models.Shape(64, 8, 2, 176)


def weights_of(layer, shape):
    return dict(layer_models.drawn(layer_models.LAYERS[layer][1](shape), np.random.default_rng(0)))


def hidden(shape, tokens=19):
    return np.random.default_rng(1).standard_normal((2, tokens, shape.width), np.float32)


def ours(layer, shape, w, x):
    make = layer_models.LAYERS[layer][0]
    return make(np, shape, w, *x.shape[:2], x.dtype)(x)


def huggingface(shape, w, x):
    """transformers' own layer with these weights."""
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner,
        rms_norm_eps=layer_models.EPS,
        attn_implementation="eager",
    )
    module = llama.LlamaDecoderLayer(config, 0)
    sizes = [n * shape.head_size for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
    q, k, v = np.split(w["qkv"], np.cumsum(sizes)[:2])
    gate, up = np.split(w["gate_up"], 2)
    names = {
        "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
        "self_attn.o_proj": w["o"], "mlp.gate_proj": gate, "mlp.up_proj": up,
        "mlp.down_proj": w["down"], "input_layernorm": w["norm1"],
        "post_attention_layernorm": w["norm2"],
    }  # fmt: skip
    state = {f"{name}.weight": torch.tensor(array) for name, array in names.items()}
    module.load_state_dict(state)
    tokens = x.shape[1]
    given = torch.tensor(x)
    positions = torch.arange(tokens)[None].expand(len(x), -1)
    angles = llama.LlamaRotaryEmbedding(config)(given, positions)
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        found = module(given, attention_mask=mask, position_embeddings=angles)
    return (found[0] if isinstance(found, tuple) else found).numpy()


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_llama_layer_is_that_of_transformers(groups):
    shape = SMALL._replace(kv_heads=groups)
    w, x = weights_of("llama", shape), hidden(shape)
    np.testing.assert_allclose(
        ours("llama", shape, w, x), huggingface(shape, w, x), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("layer", layer_models.LAYERS)
def test_the_peers_compute_what_ours_compute(layer):
    torch = pytest.importorskip("torch")
    import layer_peers

    w, x = weights_of(layer, SMALL), hidden(SMALL)
    tensors = {name: torch.tensor(array) for name, array in w.items()}
    tables = ops.rope_tables(x.shape[1], SMALL.head_size)
    tensors |= dict(zip(("cos", "sin"), map(torch.tensor, tables), strict=True))
    theirs = layer_peers.PEERS[layer](tensors, SMALL, torch.tensor(x)).numpy()
    np.testing.assert_allclose(ours(layer, SMALL, w, x), theirs, rtol=2e-5, atol=2e-5)


def test_operations_and_cases():
    shape = layer_models.SHAPES["Llama-2 7B"]
    assert layer_models.operations("ffn", shape, 512) == 2 * 512 * 2 * 4096 * 11008
    attention = layer_models.operations("plain", shape, 10) - layer_models.operations(
        "ffn", shape, 10
    )
    assert attention == 2 * 10 * 4 * 4096 * 4096 + 4 * 10 * 10 * 4096 // 2
    cases = layers.shown_in_rows()
    assert len(set(cases)) == len(cases)
    assert {case[0] for case in cases} == set(layer_models.LAYERS)
    assert {case[1] for case in cases} == set(layer_models.SHAPES)
