"""process_logits against transformers' processors, alone and in the order of generate()."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from builders import write_checkpoint

from gpt2cupy import GPT2Config, SamplingParams
from gpt2cupy.ops.reference_sampling import PROMPT_BIT, process_logits
from gpt2cupy.weights import Weights

torch = pytest.importorskip("torch", reason="parity needs torch and transformers")
transformers = pytest.importorskip("transformers", reason="parity needs torch and transformers")
pytestmark = pytest.mark.parity

CONFIG = GPT2Config(
    vocab_size=503, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
)
EOS = 0
PROMPT = [5, 17, 5, 300, 42]
BIAS = {7: 3.5, 17: -2.0, 450: -100.0}

# Ours, and the same for transformers' generate().
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 20},
    "top_k of one": {"top_k": 1},
    "top_k of all": {"top_k": 503},
    "top_k beyond": {"top_k": 4000},
    "top_p": {"top_p": 0.8},
    "small top_p": {"top_p": 0.01},
    "large top_p": {"top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "min_p of one": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.6},
    "attraction": {"repetition_penalty": 0.7},
    "bias": {"logit_bias": BIAS},
    "min_new_tokens": {"min_new_tokens": 4},
    "bias and repetition": {"logit_bias": BIAS, "repetition_penalty": 1.6},
    "k and p": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "p and min_p": {"temperature": 1.4, "top_p": 0.9, "min_p": 0.02},
    "k and min_p": {"temperature": 1.4, "top_k": 60, "min_p": 0.1},
    "min_new_tokens and k": {"min_new_tokens": 9, "top_k": 10, "logit_bias": {EOS: 30.0}},
    "all": {
        "temperature": 0.9,
        "top_k": 80,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "logit_bias": BIAS,
        "min_new_tokens": 3,
    },
}


def our_scores(logits: np.ndarray, options: dict[str, Any], generated: list[int]) -> np.ndarray:
    """What the engine hands to process_logits after these tokens."""
    params = SamplingParams(**{"temperature": 1.0} | options)
    counts = bias = None
    if params.counts_tokens:
        counts = np.zeros(CONFIG.vocab_size, np.int32)
        counts[PROMPT] = PROMPT_BIT
        np.add.at(counts, generated, 1)
    if params.logit_bias:
        bias = np.zeros(CONFIG.vocab_size, np.float32)
        bias[list(params.logit_bias)] = list(params.logit_bias.values())
    row = params.row(0, len(PROMPT), EOS)[0]
    return process_logits(logits, row, len(PROMPT) + len(generated), counts, bias)


def their_options(options: dict[str, Any]) -> dict[str, Any]:
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    if bias := given.pop("logit_bias", None):
        given["sequence_bias"] = [[[token], value] for token, value in bias.items()]
    return given


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same tokens kept, and their values to float32's rounding."""
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    kept = np.isfinite(ours)
    assert kept.any()
    np.testing.assert_allclose(ours[kept], theirs[kept], rtol=3e-7, atol=1e-6)


def processor(name: str, value: Any) -> Any:
    """One of transformers' processors by the name of our option."""
    if name == "logit_bias":
        bias = {(token,): amount for token, amount in value.items()}
        return transformers.SequenceBiasLogitsProcessor(bias)
    if name == "min_new_tokens":
        return transformers.MinNewTokensLengthLogitsProcessor(len(PROMPT), value, EOS)
    kinds = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    return kinds[name](value)


@pytest.mark.parametrize("case", [name for name, options in CASES.items() if len(options) == 1])
def test_each_processor(case):
    ((name, value),) = CASES[case].items()
    rng = np.random.default_rng(0)
    for length in range(8):
        generated = rng.integers(1, CONFIG.vocab_size, length).tolist()
        logits = (rng.standard_normal(CONFIG.vocab_size) * 4).astype(np.float32)
        ids = torch.tensor([PROMPT + generated])
        theirs = processor(name, value)(ids, torch.tensor(logits[None]))[0].numpy()
        assert_same(our_scores(logits, CASES[case], generated), theirs)


@pytest.fixture(scope="module")
def small(tmp_path_factory, hugging_face):
    """A model whose distributions are neither flat nor single peaks."""
    folder = tmp_path_factory.mktemp("sampled")
    weights = Weights.random(CONFIG, 0)
    weights.wte[...] *= 12
    write_checkpoint(folder, CONFIG, weights=weights)
    return hugging_face(folder)


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_generate(small, case):
    ids = torch.tensor([PROMPT])
    for seed in range(3):
        torch.manual_seed(seed)
        out = small.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=transformers.GenerationConfig(
                do_sample=True,
                max_new_tokens=10,
                pad_token_id=1,
                eos_token_id=EOS,
                output_logits=True,
                output_scores=True,
                return_dict_in_generate=True,
                **their_options(CASES[case]),
            ),
        )
        generated = out.sequences[0, len(PROMPT) :].tolist()
        for step, (raw, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
            ours = our_scores(raw[0].numpy(), CASES[case], generated[:step])
            assert_same(ours, scores[0].numpy())


def test_the_engine_passes_what_this_test_does():
    """SamplingParams has no processor that is missing here, but for those only we have."""
    names = {name for options in CASES.values() for name in options}
    own = {"presence_penalty", "frequency_penalty"}
    others = {"max_new_tokens", "seed", "stop", "eos_token_id", "stop_token_ids", "n", "logprobs"}
    others |= {"speculate", "logits_processor"}
    assert {f.name for f in dataclasses.fields(SamplingParams)} == names | own | others
