"""Files that torch.save itself writes, and nanoGPT's own arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
from builders import TINY, write_checkpoint

import gpt2cupy
from gpt2cupy import checkpoint

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file
UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
IDS = np.arange(40)[None] * 5 % TINY.vocab_size
ZIP, LEGACY = {}, {"_use_new_zipfile_serialization": False}


@pytest.fixture(params=[ZIP, LEGACY], ids=["zip", "legacy"])
def save(request):
    return lambda value, path: torch.save(value, path, **request.param)


def close(ours, theirs) -> bool:
    return np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
def test_a_state_dict(tmp_path, hugging_face, their_logits, save, config, stored):
    write_checkpoint(tmp_path, config)
    theirs = hugging_face(tmp_path).to(getattr(torch, stored))
    (tmp_path / "model.safetensors").unlink()
    save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    found = checkpoint.open(tmp_path)
    assert found.dtype.name == stored.replace("64", "32")
    assert found.config == config
    ours = gpt2cupy.GPT2.from_pretrained(tmp_path, device="cpu")(IDS)
    assert close(ours, their_logits(theirs.float(), IDS))


def test_parameters_and_views_of_one_storage(tmp_path, hugging_face, their_logits, save):
    """A dict of parameters, some transposed, some parts of a larger tensor."""
    write_checkpoint(tmp_path, TINY)
    theirs = hugging_face(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = dict(theirs.named_parameters())  # with attributes that transformers sets
    tensors["transformer.ln_f.bias"] = torch.nn.Parameter(tensors["transformer.ln_f.bias"].data)
    key = "transformer.h.0.mlp.c_fc.weight"
    tensors[key] = tensors[key].detach().T.contiguous().T
    both = torch.cat([tensors[f"transformer.h.{i}.ln_1.bias"].detach() for i in range(2)])
    for i in range(2):
        tensors[f"transformer.h.{i}.ln_1.bias"] = both[32 * i : 32 * i + 32]
    save(tensors, tmp_path / "pytorch_model.bin")
    assert close(
        gpt2cupy.GPT2.from_pretrained(tmp_path, device="cpu")(IDS), their_logits(theirs, IDS)
    )


def test_shards(tmp_path, hugging_face, their_logits, save):
    write_checkpoint(tmp_path, TINY)
    theirs = hugging_face(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state, places = theirs.state_dict(), {}
    for shard in range(2):
        name = f"pytorch_model-0000{shard + 1}-of-00002.bin"
        part = dict(list(state.items())[shard::2])
        save(part, tmp_path / name)
        places |= dict.fromkeys(part, name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert close(
        gpt2cupy.GPT2.from_pretrained(tmp_path, device="cpu")(IDS), their_logits(theirs, IDS)
    )


def test_prefixes_and_heads_that_transformers_leaves_out(tmp_path, hugging_face, their_logits):
    """The logits with value heads beside them are those of transformers on the same folder."""
    write_checkpoint(tmp_path, TINY)
    theirs = hugging_face(tmp_path)
    state = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    state |= {"v_head.summary.weight": torch.zeros(1, 32)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.warns(RuntimeWarning, match=r"v_head\.summary\.weight"):
        ours = gpt2cupy.GPT2.from_pretrained(tmp_path, device="cpu")(IDS)
    assert close(ours, their_logits(theirs, IDS))


class NanoGPT:
    """nanoGPT's forward pass in torch functions, over its own names and layouts."""

    def __init__(self, heads: int, layers: int, tensors: dict) -> None:
        self.heads, self.layers, self.tensors = heads, layers, tensors

    def linear(self, x, name):
        return torch.nn.functional.linear(
            x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        )

    def norm(self, x, name):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def attention(self, x, name):
        batch, count, width = x.shape
        split = self.linear(x, f"{name}.c_attn").split(width, dim=2)
        q, k, v = (
            part.view(batch, count, self.heads, width // self.heads).transpose(1, 2)
            for part in split
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        mask = torch.tril(torch.ones(count, count)) == 0
        y = scores.masked_fill(mask, float("-inf")).softmax(-1) @ v
        return self.linear(y.transpose(1, 2).reshape(batch, count, width), f"{name}.c_proj")

    def __call__(self, ids):
        table = self.tensors["transformer.wpe.weight"]
        x = self.tensors["transformer.wte.weight"][ids] + table[: ids.shape[1]]
        for layer in range(self.layers):
            name = f"transformer.h.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.ln_1"), f"{name}.attn")
            inner = self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
            x = x + self.linear(torch.nn.functional.gelu(inner), f"{name}.mlp.c_proj")
        return self.norm(x, "transformer.ln_f") @ self.tensors["lm_head.weight"].T


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(tmp_path, save, bias, prefix):
    width, layers, vocabulary, block = 32, 2, 50304, 24
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.2  # noqa: E731
    tensors = {"wte.weight": draw(vocabulary, width), "wpe.weight": draw(block, width)}
    shapes = {"attn.c_attn": 3 * width, "attn.c_proj": width, "mlp.c_fc": 4 * width}
    for i in range(layers):
        for norm in ("ln_1", "ln_2"):
            tensors[f"h.{i}.{norm}.weight"] = 1 + draw(width)
            tensors[f"h.{i}.{norm}.bias"] = draw(width)
        for name, rows in shapes.items():
            tensors[f"h.{i}.{name}.weight"] = draw(rows, width)
            tensors[f"h.{i}.{name}.bias"] = draw(rows)
        tensors[f"h.{i}.mlp.c_proj.weight"] = draw(width, 4 * width)
        tensors[f"h.{i}.mlp.c_proj.bias"] = draw(width)
        # A buffer of runs without flash attention.
        tensors[f"h.{i}.attn.bias"] = torch.tril(torch.ones(block, block)).view(1, 1, block, block)
    tensors |= {"ln_f.weight": 1 + draw(width), "ln_f.bias": draw(width)}
    if not bias:
        tensors = {k: v for k, v in tensors.items() if not k.endswith(".bias") or "attn.b" in k}
    tensors = {f"transformer.{key}": tensor for key, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    arguments = {
        "n_layer": layers,
        "n_head": 4,
        "n_embd": width,
        "block_size": block,
        "bias": bias,
        "vocab_size": vocabulary,
        "dropout": 0.0,
    }
    optimizer = torch.optim.AdamW([torch.nn.Parameter(draw(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    saved = {
        "model": {prefix + key: tensor for key, tensor in tensors.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": arguments,
        "iter_num": 7,
        "best_val_loss": torch.tensor(3.3),
        "config": {"out_dir": "out", "compile": bool(prefix)},
    }
    save(saved, tmp_path / "ckpt.pt")
    ids = torch.arange(block)[None] * 1234 % 50257
    expected = NanoGPT(4, layers, tensors)(ids).numpy()
    ours = gpt2cupy.GPT2.from_pretrained(tmp_path / "ckpt.pt", device="cpu")(ids.numpy())
    assert ours.shape == (1, block, 50257)
    assert close(ours, expected[..., :50257])


def test_what_torch_itself_refuses(tmp_path, save):
    """A module, a class of somebody's and a numpy scalar are named."""
    for value, name in [
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": np.float64(3)}, "numpy"),
        ({"a": torch.device("cpu")}, "torch.device"),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(value, tmp_path / "file.bin")
        (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
        with pytest.raises(gpt2cupy.errors.CheckpointError, match=name):
            checkpoint.open(tmp_path / "file.bin")


def test_the_remedies_in_pytorch(tmp_path, save):
    """Load in PyTorch, save the state dict as safetensors; and .contiguous() before saving."""
    from safetensors.torch import save_file

    write_checkpoint(tmp_path, TINY)
    bin_, whole = tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"
    state = load_file(whole)
    whole.unlink()
    save(state | {"loss": np.float64(3)}, bin_)
    with pytest.raises(gpt2cupy.errors.CheckpointError, match="load it in PyTorch and save its"):
        checkpoint.open(tmp_path)
    state = torch.load(bin_, weights_only=False)
    save_file({key: value for key, value in state.items() if key != "loss"}, whole)
    assert checkpoint.open(tmp_path).config == TINY
    whole.unlink()

    del state["loss"]
    key = "transformer.wpe.weight"
    state[key] = torch.zeros(48, 64)[:, ::2]
    save(state, bin_)
    with pytest.raises(gpt2cupy.errors.CheckpointError, match=r"call \.contiguous\(\)"):
        checkpoint.open(tmp_path)
    save(state | {key: state[key].contiguous()}, bin_)
    assert checkpoint.open(tmp_path).config == TINY


def test_every_kind_of_storage(tmp_path, save):
    """Types that a model's file may hold beside the weights."""
    from gpt2cupy.checkpoint import torch_file

    kinds = [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
        *(torch.int16, torch.int8, torch.uint8, torch.bool),
    ]
    save({str(kind): torch.ones(3, dtype=kind) for kind in kinds}, tmp_path / "file.pt")
    file = torch_file.read(tmp_path / "file.pt")
    found = {key: entry.dtype for key, entry in file.entries(file.value).items()}
    assert found == {f"torch.{name}": name for name in found.values()}
