"""Errors name what a shell user typed: options with their dashes, not parameters of Python."""

from __future__ import annotations

import re

import pytest
from command import CPU, call

from gpt2cupy.cli import wording
from gpt2cupy.cli.generate import generate
from gpt2cupy.cli.instruments import validate
from gpt2cupy.cli.text import tokenize
from gpt2cupy.errors import InputError
from gpt2cupy.sampling import SamplingParams

# A command that fails, and what its message must name.
MISTAKES = {
    "generate x --top-p 2": "--top-p 2.0 is impossible. It must be above 0",
    "generate x --max-new-tokens -1": "--max-new-tokens -1 is impossible. It must be 0 or more.",
    "generate x --min-new-tokens 5 --max-new-tokens 3": (
        "--min-new-tokens 5 is more than --max-new-tokens 3. Raise --max-new-tokens or lower "
        "--min-new-tokens."
    ),
    "generate x --min-new-tokens 600": "600 new ones exceed the context of 512 .*"
    "lower --min-new-tokens.",
    "generate x --max-new-tokens 600": "600 new ones exceed .* lower --max-new-tokens.",
    "generate x --stop=": "--stop '' is impossible",
    "generate x --seed -1": "--seed -1 is impossible",
    "generate x --json --logprobs 40": "--logprobs 40 is impossible. It must be from 0 to 20.",
    "generate x --eos-token-id 5000": "token id 5000 .*(--eos-token-id)",
    "generate x --decode warp": "'warp' here (--decode)",
    "generate x --gemv cublas": "--gemv cublas is for a GPU",
    "generate x --speculate ngram --top-k 1 --temperature 1 --presence-penalty 1": (
        "speculation and a penalty exclude each other.* (--speculate)"
    ),
    "generate x --model nowhere": "no folder or file 'nowhere' .* (--model)",
    "generate x --tokenizer /tmp": "or pass --tokenizer with the place of one",
    "generate x --tokenizer /nowhere": "no such file or folder (/nowhere). Pass --tokenizer",
    "generate x --device gpu": "unknown device 'gpu' (--device)",
    "generate x --dtype int8": "unknown dtype 'int8' (--dtype)",
    "score abc --window 0": "--window 0 is impossible",
    "score abc --window 4 --stride 9": "--window 4 with --stride 9 is impossible",
    "validate --seed -1": "--seed is -1 (--seed)",
    "validate --batch 0": "--batch is 0 (--batch)",
    "validate --steps 5000": "(--steps)",
    "validate --dtype float16": "(--dtype)",
    "validate --path warp": "'warp' here (--path)",
    "info --dtype f": "unknown dtype 'f' (--dtype)",
}


# What depends on the text or on files; every other is wrong usage.
NOT_USAGE = {
    "generate x --model nowhere",
    "generate x --min-new-tokens 600",
    "generate x --max-new-tokens 600",
    "generate x --tokenizer /tmp",
    "generate x --tokenizer /nowhere",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_named_as_it_was_typed(line):
    command, *rest = line.split()
    device = () if "--device" in rest else CPU
    code, out, err = call(command, *rest, *device)
    assert (code, out) == (1 if line in NOT_USAGE else 2, "")
    (message,) = [row for row in err.splitlines() if row.startswith("gpt2cupy: ")]
    assert re.search(MISTAKES[line].replace("(", r"\(").replace(")", r"\)"), message), message
    assert "SamplingParams" not in message and "None" not in message
    assert not re.search(r"[a-z]_[a-z]|[a-z]=", message), message


@pytest.mark.filterwarnings("default:running on the CPU")
def test_a_warning_is_reworded_too(monkeypatch):
    monkeypatch.setattr("gpt2cupy.loading._usable", refuse)
    code, _, err = call("tokenize", "x")
    assert code == 0 and err == ""
    code, _, err = call("generate", "x", "--max-new-tokens", "2")
    assert code == 0 and "warning: running on the CPU: too old. Use --device cpu." in err


def refuse(index):
    from gpt2cupy.errors import DeviceError

    raise DeviceError("too old", remedy="Use device='cpu'.")


def test_options_are_those_of_the_command():
    options = wording.options_of(generate)
    assert options["as_json"] == "--json" and options["model"] == "--model"
    assert "prompt" not in options, "an argument has no dashes"
    assert wording.options_of(validate)["prompt"] == "--prompt"
    without = {"logits_processor"}  # a function
    assert vars(SamplingParams()).keys() - without <= options.keys()


@pytest.mark.parametrize(
    "said, expected",
    [
        ("device='cpu'.", "--device cpu."),
        ("pass the right tokenizer=.", "pass the right --tokenizer."),
        ("stop=('a b', 'c') is", "--stop ('a b', 'c') is"),
        ("stop=('a b',) is", "--stop 'a b' is"),
        ("top_k=-1, top_p=0.5", "--top-k -1, --top-p 0.5"),
        ("the seed of a model, its dtype", "the seed of a model, its dtype"),
        ("--max-new-tokens 5", "--max-new-tokens 5"),
        ("my_max_new_tokens, max_new_tokens_too", "my_max_new_tokens, max_new_tokens_too"),
    ],
)
def test_words(said, expected):
    assert wording.reworded(said, wording.options_of(generate)) == expected
    assert wording.reworded(said, {}) == said


def test_a_file_keeps_its_name():
    error = InputError("the file top_p=1 cannot be read", where="/home/n_ame/top_k.txt")
    options = wording.options_of(tokenize)
    assert str(wording.in_options(error, options)) == str(error)


@pytest.mark.filterwarnings("default:dtype=")
def test_another_dtype_on_the_cpu_is_said():
    arguments = ("generate", "x", *CPU, "--max-new-tokens", "2", "--dtype")
    code, out, err = call(*arguments, "float16")
    expected = "gpt2cupy: warning: --dtype float16 is for a GPU: the CPU holds weights and computes"
    assert code == 0 and out and expected in err
    assert "warning" not in call(*arguments, "float32")[2]
