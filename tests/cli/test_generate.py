"""gpt2cupy generate."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from command import CPU, SHORT, call, cli, done

import gpt2cupy
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


def test_a_prompt_that_is_not_text_is_taken():
    shown = cli("generate", os.fsdecode(b"\xff\xfe"), *SHORT, "--quiet")
    assert (shown.returncode, shown.stderr) == (0, "")


def test_every_sampling_option_arrives(monkeypatch):
    seen = []

    def stream(self, prompt, params):
        seen.append(params)
        return iter(())

    monkeypatch.setattr(LanguageModel, "stream", stream)
    monkeypatch.setattr(LanguageModel, "generate", lambda *given: seen.append(given[2]) or [])
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
        eos_token_id=-1,
        n=3,
        logprobs=4,
    )
    flags = []
    for field in dataclasses.fields(SamplingParams):
        value = getattr(wanted, field.name)
        if field.name == "logit_bias":
            continue  # has no flag
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
        assert (row["text"], row["ids"]) == (each.text, each.tokens)
        assert row["finish_reason"] == each.finish_reason
        assert (row["index"], row["seed"]) == (index, 3 + index)
        # Another number of slots may round otherwise.
        assert row["logprobs"] == pytest.approx(each.logprobs, abs=1e-5)
        tops = zip(row["top_logprobs"], each.top, strict=True)
        for step, expected in tops:
            assert [one["id"] for one in step] == [id_ for id_, _ in expected]
            assert step[0]["logprob"] == pytest.approx(expected[0][1], abs=1e-5)
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0


def test_json_without_logprobs_has_none():
    row = json.loads(done("generate", "ROMEO:", *SHORT, "--json"))
    assert not {"logprobs", "top_logprobs"} & row.keys()


def test_a_seed_that_was_drawn_is_told():
    sampled = ("--temperature", "1.5", "--json")
    first, other = (json.loads(done("generate", "A", *SHORT, *sampled)) for _ in range(2))
    assert first["seed"] != other["seed"]
    again = json.loads(done("generate", "A", *SHORT, *sampled, "--seed", str(first["seed"])))
    assert again["ids"] == first["ids"]


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
    assert len(row["ids"]) == min(200, lm.config.n_positions + 1 - used)
    code, _, err = call("generate", "-", *CPU, "--max-new-tokens", "200", stdin=prompt.encode())
    assert code == (1 if used > lm.config.n_positions - 199 else 0) == 1 and "context" in err


def test_new_tokens_by_default_are_as_many_as_must_come():
    row = json.loads(done("generate", "x", *CPU, "--json", "--min-new-tokens", "220"))
    assert len(row["ids"]) == 220


def test_another_tokenizer(tmp_path):
    same = str(EMBEDDED["shakespeare"])
    arguments = ("generate", "ROMEO:", *SHORT)
    assert done(*arguments, "--tokenizer", same) == done(*arguments)
    code, _, err = call(*arguments, "--tokenizer", str(tmp_path))
    assert code == 1 and str(tmp_path) in err


@pytest.mark.parametrize("path", ["graph", "bogus"])
def test_a_decode_path_that_is_not_there_is_refused_before_anything_is_written(path):
    code, out, err = call("generate", "x", *SHORT, "--decode", path)
    assert code == 1 and out == "" and path in err


def test_a_batch_invariant_continuation_is_what_it_is_alone():
    arguments = ("generate", "ROMEO:", *CPU, "--json", "--max-new-tokens", "12", "--logprobs", "3")
    drawn = (*arguments, "--batch-invariant", "--temperature", "1", "--seed", "5")
    alone = json.loads(done(*drawn))
    first, _, third = map(json.loads, done(*drawn, "--n", "3").splitlines())
    for key in ("ids", "logprobs", "top_logprobs"):
        assert first[key] == alone[key] != third[key]


def test_gemv_means_nothing_on_the_cpu():
    code, out, err = call("generate", "x", *SHORT, "--gemv", "cublas")
    assert code == 1 and out == "" and "--gemv" in err


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["ours", "cublas"])
def test_gemv_chooses_the_backend(backend, monkeypatch):
    seen = []
    stream = LanguageModel.stream

    def watch(self, *given):
        seen.append(self.model.gemv)
        return stream(self, *given)

    monkeypatch.setattr(LanguageModel, "stream", watch)
    done("generate", "x", "--device", "cuda", "--max-new-tokens", "3", "--gemv", backend)
    assert seen == [backend]
