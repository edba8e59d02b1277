"""gpt2cupy generate."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from command import CPU, SHORT, call, cli, done

import gpt2cupy
from gpt2cupy import output
from gpt2cupy.checkpoint.resolve import EMBEDDED
from gpt2cupy.lm import LanguageModel
from gpt2cupy.sampling import SamplingParams


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


def test_generate_writes_text_to_stdout_and_the_rest_to_stderr():
    arguments = ("generate", "ROMEO:", *SHORT)
    loud, quiet = cli(*arguments), cli(*arguments, "--quiet")
    assert loud.returncode == quiet.returncode == 0
    assert loud.stdout == quiet.stdout and loud.stdout.startswith("ROMEO:")
    assert "float32 on cpu" in loud.stderr and "5 tokens (length)" in loud.stderr
    assert quiet.stderr == ""


def test_the_prompt_from_everywhere(tmp_path, lm):
    prompt = "What, ho!\nTybalt — "
    path = tmp_path / "prompt.txt"
    path.write_text(prompt, encoding="utf-8")
    expected = prompt + lm.generate(prompt, max_new_tokens=5).text + "\n"
    data = prompt.encode()
    assert done("generate", prompt, *SHORT) == expected
    assert done("generate", "--file", str(path), *SHORT) == expected
    assert done("generate", *SHORT, stdin=data) == expected, "a pipe without a prompt"
    assert done("generate", "-", *SHORT, stdin=data) == expected
    assert done("generate", "--file", "-", *SHORT, stdin=data) == expected
    # Given text goes before a pipe that happens to be there, as under cron.
    assert done("generate", prompt, *SHORT, stdin=b"other") == expected
    piped = cli("generate", *SHORT, input=prompt)
    assert (piped.returncode, piped.stdout) == (0, expected)


def test_no_prompt_at_all_begins_a_text(lm):
    expected = lm.generate("", max_new_tokens=5).text + "\n"
    assert done("generate", *SHORT) == expected, "a terminal is not waited for"
    assert done("generate", *SHORT, stdin=b"") == expected


def test_a_terminal_is_read_when_asked():
    assert done("tokenize", "-") == done("tokenize", "--file", "-") == done("tokenize", "typed")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", b"abc\xff", *SHORT),
        ("generate", "-p", b"abc\xff", *SHORT),
        ("generate", "x", "--stop", "a", "--stop", b"abc\xff", *SHORT),
        ("score", b"abc\xff", *CPU),
        ("tokenize", b"abc\xff"),
    ],
    ids=str,
)
def test_an_argument_that_is_not_text_is_refused_as_on_stdin(arguments):
    shown = cli(*map(os.fsdecode, arguments))
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr.startswith("gpt2cupy: byte 3 is not UTF-8 (argument). Convert the text")


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfTo be")
    assert done("tokenize", "--file", str(path)) == done("tokenize", "To be")
    assert done("tokenize", stdin=path.read_bytes()) == done("tokenize", "To be")


def test_every_sampling_option_arrives(monkeypatch):
    seen = []

    def note(self, prompt, **settings):
        seen.append(SamplingParams(**settings))
        return []

    monkeypatch.setattr(LanguageModel, "stream", note)
    monkeypatch.setattr(LanguageModel, "generate", note)
    wanted = SamplingParams(
        max_new_tokens=7,
        min_new_tokens=2,
        temperature=0.7,
        top_k=11,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=5,
        stop=("a", "b"),
        logit_bias={5: 1.5, 7: -float("inf")},
        eos_token_id=-1,
        stop_token_ids=(8, 9),
        n=3,
        logprobs=4,
    )
    flags = []
    for field in dataclasses.fields(SamplingParams):
        value = getattr(wanted, field.name)
        # Excluded by penalties, with a test of its own below; a function has no option.
        if field.name in ("speculate", "logits_processor"):
            continue
        if field.name == "logit_bias":
            flags += ["--logit-bias", "5=1.5", "--logit-bias", "7=-inf"]
            continue
        assert value != field.default, f"{field.name}: this test would not see that it is ignored"
        for each in value if isinstance(value, tuple) else (value,):
            flags += [f"--{field.name.replace('_', '-')}", str(each)]
    done("generate", "x", *CPU, "--json", *flags)
    assert seen == [wanted]
    without = flags[: flags.index("--n")]
    done("generate", "x", *CPU, *without)
    assert seen[1] == dataclasses.replace(wanted, n=1, logprobs=None)


def test_several_continuations(lm):
    sampled = ("--temperature", "0.9", "--seed", "3")
    code, out, err = call("generate", "ROMEO:", *SHORT, *sampled, "--n", "3")
    found = lm.generate("ROMEO:", max_new_tokens=5, temperature=0.9, seed=3, n=3)
    assert code == 0 and out == "".join(f"ROMEO:{each.text}\n" for each in found)
    assert all(f"[{i} of 3: 5 tokens (length)]" in err for i in (1, 2, 3)) and "15 tokens" in err
    assert call("generate", "ROMEO:", *SHORT, *sampled, "--n", "3", "-q") == (0, out, "")


@pytest.mark.parametrize("n", [1, 2])
def test_json_has_all_that_the_library_gives(lm, n):
    options = {"max_new_tokens": 30, "temperature": 0.9, "seed": 3, "n": n, "logprobs": 2}
    flags = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    out = done("generate", "ROMEO:", *CPU, "--json", "--stop", "\n\n", *flags)
    rows = [json.loads(line) for line in out.splitlines()]
    found = lm.generate("ROMEO:", stop="\n\n", **options)
    assert len(rows) == n
    for index, (row, each) in enumerate(zip(rows, found if n > 1 else [found], strict=True)):
        assert row["prompt"] == "ROMEO:" and row["prompt_ids"] == lm.encode("ROMEO:").tolist()
        assert (row["text"], row["tokens"]) == (each.text, each.tokens)
        assert set(row) - {"prompt", "index", "seconds", "tokens_per_second"} == set(vars(each))
        assert row["finish_reason"] == each.finish_reason
        assert (row["index"], row["seed"]) == (index, 3 + index)
        # Another number of slots may round otherwise.
        assert row["logprobs"] == pytest.approx(each.logprobs, abs=1e-5)
        for step, expected in zip(row["top"], each.top, strict=True):
            assert [id_ for id_, _ in step] == [id_ for id_, _ in expected]
            assert step[0][1] == pytest.approx(expected[0][1], abs=1e-5)
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0


def test_json_without_logprobs_has_none():
    row = json.loads(done("generate", "ROMEO:", *SHORT, "--json"))
    assert not {"logprobs", "top"} & row.keys()


def test_a_seed_that_was_drawn_is_told():
    sampled = ("--temperature", "1.5", "--json")
    first, other = (json.loads(done("generate", "A", *SHORT, *sampled)) for _ in range(2))
    assert first["seed"] != other["seed"]
    again = json.loads(done("generate", "A", *SHORT, *sampled, "--seed", str(first["seed"])))
    assert again["tokens"] == first["tokens"]
    assert json.loads(done("generate", "A", *SHORT, "--json"))["seed"] is None, "greedy has none"


def test_stop_ends_before_the_text(lm):
    whole = lm.generate("ROMEO:", max_new_tokens=20).text
    word = whole.split()[2]
    shown = done("generate", "ROMEO:", *CPU, "--max-new-tokens", "20", "--stop", word)
    assert shown == "ROMEO:" + whole[: whole.index(word)] + "\n"


def test_new_tokens_by_default_fit_the_context(lm):
    ids = [5] * (lm.config.n_positions - 10)
    prompt = lm.tokenizer.decode(ids)
    used = len(lm.encode(prompt))
    row = json.loads(done("generate", "-", *CPU, "--json", stdin=prompt.encode()))
    assert len(row["tokens"]) == min(200, lm.config.n_positions + 1 - used)
    code, _, err = call("generate", "-", *CPU, "--max-new-tokens", "200", stdin=prompt.encode())
    assert code == (1 if used > lm.config.n_positions - 199 else 0) == 1 and "context" in err
    assert f"{lm.config.n_positions + 1 - used} new tokens fit" in err


def test_new_tokens_by_default_are_as_many_as_must_come():
    row = json.loads(done("generate", "x", *CPU, "--json", "--min-new-tokens", "220"))
    assert len(row["tokens"]) == 220


def test_another_tokenizer(tmp_path):
    same = str(EMBEDDED["shakespeare"])
    arguments = ("generate", "ROMEO:", *SHORT)
    assert done(*arguments, "--tokenizer", same) == done(*arguments)
    code, _, err = call(*arguments, "--tokenizer", str(tmp_path))
    assert code == 1 and str(tmp_path) in err


@pytest.mark.parametrize("path", ["graph", "bogus"])
def test_a_decode_path_that_is_not_there_is_refused_before_anything_is_written(path):
    code, out, err = call("generate", "x", *SHORT, "--decode", path)
    assert code == 2 and out == "" and path in err


def test_a_batch_invariant_continuation_is_what_it_is_alone():
    arguments = ("generate", "ROMEO:", *CPU, "--json", "--max-new-tokens", "12", "--logprobs", "3")
    drawn = (*arguments, "--batch-invariant", "--temperature", "1", "--seed", "5")
    alone = json.loads(done(*drawn))
    first, _, third = map(json.loads, done(*drawn, "--n", "3").splitlines())
    for key in ("tokens", "logprobs", "top"):
        assert first[key] == alone[key] != third[key]


def test_gemv_means_nothing_on_the_cpu():
    code, out, err = call("generate", "x", *SHORT, "--gemv", "cublas")
    assert code == 2 and out == "" and "--gemv" in err


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["ours", "cublas"])
def test_gemv_chooses_the_backend(backend, monkeypatch):
    seen = []
    stream = LanguageModel.stream

    def watch(self, *given, **options):
        seen.append(self.model.gemv)
        return stream(self, *given, **options)

    monkeypatch.setattr(LanguageModel, "stream", watch)
    done("generate", "x", "--device", "cuda", "--max-new-tokens", "3", "--gemv", backend)
    assert seen == [backend]


# -- what people type ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), ("generate",), ("score",), ("tokenize",), ("info",)])
def test_help_by_one_letter_and_flags_as_flags(command):
    shown = done(*command, "-h")
    assert shown == done(*command, "--help") and "Usage" in shown
    assert "<bool>" not in shown and "BOOLEAN" not in shown


def test_the_prompt_as_an_option(lm):
    expected = done("generate", "ROMEO:", *SHORT)
    assert done("generate", "-p", "ROMEO:", *SHORT) == expected
    assert done("generate", "--prompt", "ROMEO:", *SHORT) == expected
    assert done("generate", "-p", "-", *SHORT, stdin=b"ROMEO:") == expected
    code, out, err = call("generate", "ROMEO:", "-p", "JULIET:", *SHORT)
    assert (code, out) == (2, "") and "once" in err
    without = done("generate", "ROMEO:", "--no-echo", *SHORT)
    assert "ROMEO:" + without == expected
    sampled = ("--temperature", "1", "--seed", "3", *SHORT)
    several = done("generate", "ROMEO:", "-n", "2", "--no-echo", *sampled)
    assert several == done("generate", "ROMEO:", "--n", "2", *sampled).replace("ROMEO:", "")


def test_special_tokens_of_a_prompt(lm):
    text = "<|endoftext|>ROMEO:"
    ids = [lm.tokenizer.eot_token, *lm.tokenizer.encode("ROMEO:")]
    for flags, expected in ((("--special",), ids), ((), lm.tokenizer.encode(text))):
        row = json.loads(done("generate", text, *flags, *SHORT, "--json"))
        assert (row["prompt"], row["prompt_ids"]) == (text, expected)
        row = json.loads(done("score", text, *flags, *CPU, "--json", "--tokens"))
        assert row["tokens"] == expected


def test_a_bias_from_the_command_line(lm):
    first = lm.generate("ROMEO:", max_new_tokens=1).tokens[0]
    for typed in ("7=1e6", "7:1e6", "7=+1000000"):
        row = json.loads(done("generate", "ROMEO:", *SHORT, "--json", "--logit-bias", typed))
        assert row["tokens"] == [7] * 5
    row = json.loads(done("generate", "ROMEO:", *SHORT, "--json", "--logit-bias", f"{first}=-inf"))
    assert first not in row["tokens"]
    for wrong in ("7", "x=1", "7=nan", "7=inf", "-1=3", "7=1=2", "="):
        code, out, err = call("generate", "x", *SHORT, "--logit-bias", wrong)
        assert (code, out) == (2, "") and "logit" in err


@pytest.mark.filterwarnings("default:.*without a temperature")
@pytest.mark.parametrize(
    "flags, says",
    [
        (("--seed", "5"), "--seed 5 does nothing without a temperature"),
        (("--n", "3"), "--n 3 does nothing without"),
        (("--top-k", "40", "--top-p", "0.9"), "--top-k 40, --top-p 0.9 do nothing without"),
    ],
)
def test_an_option_that_does_nothing_is_one_line(flags, says):
    code, _, err = call("generate", "x", *SHORT, *flags)
    lines = [line for line in err.splitlines() if "nothing" in line]
    assert code == 0 and len(lines) == 1 and lines[0].startswith(f"gpt2cupy: warning: {says}")
    assert call("generate", "x", *SHORT, *flags, "-q")[2] == ""
    assert "nothing" not in call("generate", "x", *SHORT, *flags, "--temperature", "1")[2]


def test_numbers_that_json_has_not_are_null():
    found = {"a": [float("nan"), (float("-inf"), 1.5)], "b": {"c": float("inf")}, "d": "x"}
    assert output.with_nulls(found) == {"a": [None, [None, 1.5]], "b": {"c": None}, "d": "x"}


def test_speculation_gives_the_same_text_and_says_what_stood():
    arguments = ("generate", "And the king and the king and the king and the", *CPU)
    arguments += ("--max-new-tokens", "40")
    plain, guessed = cli(*arguments), cli(*arguments, "--speculate", "ngram")
    assert guessed.returncode == 0 and guessed.stdout == plain.stdout
    assert "drafts accepted" in guessed.stderr and "drafts accepted" not in plain.stderr
    row = json.loads(done(*arguments, "--speculate", "ngram", "--json"))
    assert 0 < row["accepted"] <= row["drafted"]
    penalty = cli(*arguments, "--speculate", "ngram", "--repetition-penalty", "1.2")
    assert penalty.returncode == 2 and "exclude each other" in penalty.stderr
