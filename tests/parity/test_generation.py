"""Greedy texts of 200 tokens against transformers' generate(), equal up to a near-tie."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import write_checkpoint
from chosen import GPT2_WTE, is_gpt2_124m
from error_rule import errors, one_ulp

from gpt2cupy import GPT2, GPT2Config, SamplingParams
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request

torch = pytest.importorskip("torch", reason="parity needs torch and transformers")
pytest.importorskip("transformers", reason="parity needs torch and transformers")
pytestmark = pytest.mark.parity

TOKENS = 200
TURING = "Alan Turing theorized that computers would one day become"


def our_greedy(model: GPT2, prompt: list[int], count: int = TOKENS) -> list[int]:
    request = Request(0, np.asarray(prompt, np.int32), SamplingParams(max_new_tokens=count))
    return [token.id for token in Engine(model).run([request])]


def their_greedy(model: Any, prompt: list[int], count: int = TOKENS) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[0, len(prompt) :].tolist()


def assert_same_text(ours: list[int], theirs: list[int], prompt: list[int], model: Any) -> None:
    """Equal, or parted at a step whose float64 gap is inside the error rule.

    The float64 logits are theirs as well: an oracle of ours that were wrong
    would make every gap look small beside the error that it sees in theirs.
    """
    assert len(ours) == len(theirs)
    parted = [step for step in range(len(ours)) if ours[step] != theirs[step]]
    if not parted:
        return
    ids = torch.tensor([[*prompt, *ours[: parted[0]]]])
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(ids).logits[0, -1].numpy()
        error = errors(model(ids).logits[0, -1].numpy(), exact)[0]
    allowed = 2 * error + one_ulp(float(np.abs(exact).max()), np.dtype(np.float32))
    second, first = np.sort(exact)[-2:]
    print(f"parted at step {parted[0]}: gap {first - second:.2e}, allowed {allowed:.2e}")
    assert first - second <= allowed, f"step {parted[0]}: gap {first - second:.2e}"


@pytest.mark.parametrize(
    "text", ["", "ROMEO:", "First Citizen:\nBefore we proceed any further,", "zq\n\n9 é"]
)
def test_embedded_text(embedded, their_embedded, text):
    prompt = embedded.encode(text).tolist()
    if not text:
        assert prompt == [embedded.tokenizer.eot_token]
    ours = embedded.generate(text, max_new_tokens=TOKENS, eos_token_id=-1)
    theirs = their_greedy(their_embedded, prompt)
    assert_same_text(ours.tokens, theirs, prompt, their_embedded)
    assert len(set(theirs)) > 10, "a text that repeats itself tests little"


def test_embedded_batch_of_ragged_prompts(embedded, their_embedded):
    texts = ["JULIET:\n", "", "KING RICHARD III:\nNow is the winter of our discontent"]
    found = embedded.generate(texts, max_new_tokens=60, eos_token_id=-1)
    for text, ours in zip(texts, found, strict=True):
        prompt = embedded.encode(text).tolist()
        theirs = their_greedy(their_embedded, prompt, 60)
        assert_same_text(ours.tokens, theirs, prompt, their_embedded)


def test_embedded_text_ends_where_theirs_does(embedded, their_embedded):
    """A token made the end token ends both texts at its first place."""
    prompt = embedded.encode("ROMEO:").tolist()
    free = their_greedy(their_embedded, prompt, 30)
    end = free[20]
    ours = embedded.generate(prompt, max_new_tokens=30, eos_token_id=end)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        theirs = their_embedded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
    assert ours.tokens == theirs and ours.finish_reason == "eos"


def test_random_124m_text(tmp_path, hugging_face):
    config = GPT2Config.from_name("gpt2")
    write_checkpoint(tmp_path, config, 4)
    model, theirs = GPT2.from_pretrained(str(tmp_path), device="cpu"), hugging_face(tmp_path)
    for prompt, count in (([config.eos_token_id], TOKENS), ([464, 3290, 318, 257], 20)):
        ours = our_greedy(model, prompt, count)
        other = their_greedy(theirs, prompt, count)
        assert_same_text(ours, other, prompt, theirs)


def test_text_of_the_chosen_model(chosen):
    lm, theirs = chosen
    for text in (TURING, ""):
        prompt = lm.encode(text).tolist()
        ours = lm.generate(text, max_new_tokens=TOKENS, eos_token_id=-1)
        other = their_greedy(theirs, prompt)
        print(repr(ours.text))
        assert_same_text(ours.tokens, other, prompt, theirs)


def test_the_well_known_text_of_gpt2(gpt2_124m):
    found = gpt2_124m.generate(TURING, max_new_tokens=8)
    assert found.text == " the most powerful machines on the planet."


def test_gpt2_is_known_by_its_weights():
    """Else the test above would pass over the weights, or ask the known text of others."""
    wte = np.zeros((50257, 768), np.float16)
    wte[0, :3] = GPT2_WTE
    for value, shape, expected in [
        (0, "gpt2", True),
        (0.01, "gpt2", False),
        (0, "distilgpt2", False),
    ]:
        tensors = [("wpe", None, wte), ("wte", None, wte + np.float16(value))]
        found = SimpleNamespace(
            config=GPT2Config.from_name(shape), tensors=lambda tensors=tensors: iter(tensors)
        )
        assert is_gpt2_124m(found) is expected
