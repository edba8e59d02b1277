"""llm.c's model files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import BFLOAT16, TINY, write_llmc

from gpt2cupy import checkpoint
from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.weights import Weights

# llm.c stores neither: GPT-2's end of text lies outside this vocabulary.
CONFIG = dataclasses.replace(TINY, bos_token_id=None, eos_token_id=None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpt2_tiny.bin"


def refused(path) -> Gpt2CupyError:
    with pytest.raises(Gpt2CupyError) as caught:
        checkpoint.open(path)
    assert caught.value.where == str(path) and caught.value.remedy
    return caught.value


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_every_tensor_finds_its_place(path, dtype):
    weights = Weights.random(CONFIG, 0, dtype)
    write_llmc(path, CONFIG, weights)
    found = checkpoint.open(str(path))
    assert found.config == CONFIG
    assert (found.dtype, found.path, found.name) == (dtype, path, str(path))
    got = dict(Weights.from_tensors(CONFIG, found.tensors(finite=True), dtype).items())
    for name, array in weights.items():
        assert np.array_equal(got[name].astype(dtype), array.astype(dtype)), name
    assert found.nbytes == sum(a.nbytes for _, _, a in found.tensors())


def test_header_fields_keep_their_meaning(path):
    write_llmc(path, CONFIG, Weights.random(CONFIG, 0))
    header = np.frombuffer(path.read_bytes(), "<i4", 8).tolist()
    assert header == [20240326, 3, 48, 211, 2, 2, 32, 256]


@pytest.mark.parametrize("keep", [0, 3, 16, 1000, 1024, -4])
def test_truncated(path, keep):
    write_llmc(path, CONFIG, Weights.random(CONFIG, 0))
    path.write_bytes(path.read_bytes()[:keep])
    refused(path)


def test_too_long(path):
    write_llmc(path, CONFIG, Weights.random(CONFIG, 0))
    path.write_bytes(path.read_bytes() + bytes(4))
    assert "its header asks for" in refused(path).what


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (place, value)
        for place in range(8)
        for value in (0, -1, 1, 4, 2**31 - 1)
        # Fewer tokens than rows, or another number of heads, are other models of the same size.
        if (place, value) not in [(3, 1), (3, 4), (5, 1), (5, 4)]
    ],
)
def test_wrong_headers(path, place, value):
    write_llmc(path, CONFIG, Weights.random(CONFIG, 0))
    data = bytearray(path.read_bytes())
    data[4 * place : 4 * place + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(data)
    refused(path)


def test_a_head_count_cannot_be_checked_but_must_divide(path):
    write_llmc(path, CONFIG, Weights.random(CONFIG, 0))
    data = bytearray(path.read_bytes())
    data[20:24] = (5).to_bytes(4, "little")
    path.write_bytes(data)
    assert "not a multiple of n_head" in refused(path).what


def test_the_versions_before_padding_are_named(path):
    write_llmc(path, CONFIG, Weights.random(CONFIG, 0))
    data = bytearray(path.read_bytes())
    data[4:8] = (1).to_bytes(4, "little")
    path.write_bytes(data)
    assert "version 1" in refused(path).what
    assert "version 3" in refused(path).remedy


@pytest.mark.parametrize("data", [b"\x01\x02\x03", bytes(4000)], ids=len)
def test_another_file(path, data):
    path.write_bytes(data)
    assert "no checkpoint that is known" in refused(path).what
