"""The command line: what it writes where, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2cupy
from gpt2cupy.checkpoint.resolve import EMBEDDED
from gpt2cupy.cli.app import app
from gpt2cupy.errors import CompileError
from gpt2cupy.lm import LanguageModel
from gpt2cupy.record import ROOT
from gpt2cupy.sampling import SamplingParams

CLI = (sys.executable, "-m", "gpt2cupy")
CPU = ("--device", "cpu")
SHORT = (*CPU, "--max-new-tokens", "5")
# What colours depend on is this test's to say.
PLAIN_ENV = {
    key: value
    for key, value in os.environ.items()
    if key not in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TERM")
}


def cli(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """The command as a process, with nothing on stdin unless ``input`` is given."""
    given = {"stdin": subprocess.DEVNULL} if "input" not in options else {}
    given |= {"capture_output": True, "text": True, "cwd": ROOT, "env": PLAIN_ENV}
    return subprocess.run([*CLI, *arguments], **(given | options))


class Terminal(io.BytesIO):
    """A stdin that nobody pipes into."""

    def isatty(self) -> bool:
        return True


def call(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command inside this process."""
    source = Terminal(b"typed") if stdin is None else io.BytesIO(stdin)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    saved, sys.stdin = sys.stdin, io.TextIOWrapper(source)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                app(list(arguments), prog_name="gpt2cupy")
            except SystemExit as end:
                code = end.code
    finally:
        sys.stdin = saved
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return code, *texts


def done(*arguments: str, stdin: bytes | None = None) -> str:
    """Stdout of a command that succeeds."""
    code, out, err = call(*arguments, stdin=stdin)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


# -- entry ---------------------------------------------------------------------------------------


def test_version():
    shown = cli("--version")
    assert (shown.returncode, shown.stdout) == (0, f"gpt2cupy {gpt2cupy.__version__}\n")


def test_the_installed_command_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'gpt2cupy = "gpt2cupy.cli:main"' in text
    code = "import sys; sys.argv = ['gpt2cupy', '--version']; from gpt2cupy.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (shown.returncode, shown.stdout) == (0, f"gpt2cupy {gpt2cupy.__version__}\n")


# -- generate ------------------------------------------------------------------------------------


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


def test_another_tokenizer(tmp_path):
    same = str(EMBEDDED["shakespeare"])
    arguments = ("generate", "ROMEO:", *SHORT)
    assert done(*arguments, "--tokenizer", same) == done(*arguments)
    code, _, err = call(*arguments, "--tokenizer", str(tmp_path))
    assert code == 1 and str(tmp_path) in err


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


# -- score and tokenize --------------------------------------------------------------------------


def test_score(lm):
    text = "To be, or not to be: that is the question.\nWhether 'tis nobler — "
    found = lm.score(text)
    shown = done("score", text, *CPU)
    numbers = dict(re.findall(r"^(\w[\w ]*?) +([\d.]+)$", shown, re.MULTILINE))
    assert numbers == {
        "tokens": str(len(found.tokens)),
        "bytes": str(len(text.encode())),
        "bits per byte": f"{found.bits_per_byte(text):.4f}",
        "perplexity": f"{found.perplexity:.4f}",
    }
    assert done("score", *CPU, stdin=text.encode()) == shown


def test_score_per_token(lm):
    found = lm.score("To be")
    lines = done("score", "To be", *CPU, "--tokens").splitlines()
    each = [line.split("\t") for line in lines if "\t" in line]
    assert [int(line[0]) for line in each] == found.tokens
    assert [float(line[1]) for line in each] == pytest.approx(found.logprobs, abs=1e-4)
    assert [line[2] for line in each] == ["'To'", "' be'"]


def test_score_as_json_with_windows(lm, tmp_path):
    text = "To be, or not to be: that is the question. " * 5
    (tmp_path / "text").write_text(text)
    windows = ("--window", "16", "--stride", "4")
    row = json.loads(
        done("score", "--file", str(tmp_path / "text"), *CPU, *windows, "--json", "--tokens")
    )
    found = lm.score(text, window=16, stride=4)
    assert row["perplexity"] == found.perplexity != lm.score(text).perplexity
    assert row["bits_per_byte"] == found.bits_per_byte(text)
    assert (row["tokens"], row["ids"]) == (len(found.tokens), found.tokens)
    assert row["logprobs"] == found.logprobs.tolist()
    short = json.loads(done("score", text, *CPU, "--json"))
    assert not {"ids", "logprobs"} & short.keys()


def test_nothing_to_score():
    code, out, err = call("score", "", *CPU, "--quiet")
    assert code == 1 and out == "" and "nothing to score" in err


def test_tokenize(lm):
    text = "To be, or naïve 🙂?"
    ids = lm.tokenizer.encode(text)
    assert done("tokenize", text) == " ".join(map(str, ids)) + "\n"
    row = json.loads(done("tokenize", text, "--json"))
    assert row == {"ids": ids, "tokens": [lm.tokenizer.decode([id_]) for id_ in ids]}


@settings(deadline=None, max_examples=25)
@given(st.text())
def test_decoding_gives_back_the_bytes(text):
    ids = done("tokenize", "-", stdin=text.encode())
    assert done("tokenize", "--decode", stdin=ids.encode()) == text


def test_ids_in_every_writing(lm):
    text = lm.tokenizer.decode([395, 304])
    for ids in (("395", "304"), ("395 304",), ("395,304",), ("[395, 304]",)):
        assert done("tokenize", "--decode", *ids) == text
    row = json.loads(done("tokenize", "--decode", "--json", "395", "304"))
    assert row == {"ids": [395, 304], "text": text}
    assert done("tokenize", "--decode", stdin=b" \n") == ""


@pytest.mark.parametrize("ids", ["x", "1.5", "1 2 three", "99999", "9" * 5000])
def test_ids_that_are_none(ids):
    code, out, err = call("tokenize", "--decode", ids)
    assert code == 1 and out == "" and err.startswith("gpt2cupy: ") and err.count("\n") == 1


def test_special_tokens_only_when_asked(lm):
    text = "<|endoftext|>"
    assert done("tokenize", text, "--special") == f"{lm.tokenizer.eot_token}\n"
    assert len(done("tokenize", text).split()) > 1


def test_tokenize_needs_no_model():
    arguments = ("tokenize", "To be", "--tokenizer", str(EMBEDDED["shakespeare"]))
    assert done(*arguments, "--model", "/no/such/model") == done("tokenize", "To be")


# -- info and compile ----------------------------------------------------------------------------


def test_info_names_what_would_run():
    shown = done("info", *CPU)
    for label in ("versions", "device", "kernel cache", "weights", "cache", "decode state"):
        assert re.search(rf"^{label} ", shown, re.MULTILINE), label


def test_info_as_json(lm):
    facts = json.loads(done("info", *CPU, "--json"))
    assert facts["versions"]["gpt2cupy"] == gpt2cupy.__version__
    assert facts["device"] == {"kind": "cpu", "reason": "asked for"}
    assert facts["model"]["n_layer"] == lm.config.n_layer
    assert facts["model"]["dtype"] == "float32" and facts["model"]["stored_dtype"] == "float16"
    assert facts["memory"]["weights"] == lm.model.weights.nbytes


def without_cupy(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.modules['cupy'] = None; sys.argv[0] = 'gpt2cupy'\n"
        "from gpt2cupy.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_info_needs_no_cupy():
    shown = without_cupy("info")
    assert shown.returncode == 0 and shown.stderr == ""
    assert "cpu (CuPy is not installed)" in shown.stdout


@pytest.mark.parametrize("arguments", [("info", "--kernels"), ("compile",)])
def test_what_needs_cupy_says_so(arguments):
    failed = without_cupy(*arguments)
    assert failed.returncode == 1 and failed.stdout == ""
    assert "CuPy is not installed" in failed.stderr and failed.stderr.count("\n") == 1


def test_info_kernels_without_a_gpu():
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    from gpt2cupy.ops import compiler

    arguments = ("info", "--kernels", "--arch", "sm_90", "--dtype", "float16")
    rows = [json.loads(line) for line in done(*arguments, "--json").splitlines()]
    assert {"embedding", "layer_norm", "sample"} <= {row["entry"] for row in rows}
    assert {row["source"] for row in rows} == set(compiler.SOURCES)
    assert {row["macros"].get("HS", "64") for row in rows} == {"64"}
    assert {row["macros"].get("K", "256") for row in rows} == {"256", "1024"}
    for row in rows:
        name = row["entry"]
        assert row["arch"] == "sm_90" and 0 < row["registers"] <= 255
        assert row["local_bytes"] == 0, f"{name} spills"
        if row["threads"] is None:
            # Lower rungs of the ladders; everything else must say how it is launched.
            rungs = ("layer_norm_naive", "gemv_naive", "gemv", "attention_naive")
            assert name.removesuffix("_f32") in rungs
        else:
            assert row["blocks_per_sm"] > 0 and 0 < row["occupancy"] <= 1
    table = done(*arguments).splitlines()
    assert table[0].split()[0] == "sm_90" and "registers" in table[0]
    for line, row in zip(table[1:-1], rows, strict=True):
        numbers = [str(row[key]) for key in ("registers", "local_bytes", "shared_bytes")]
        sizes = [f"{key}={value}" for key, value in row["macros"].items() if key != "ELEM"]
        assert line.split()[:-3] == [f"{row['source']}:", row["entry"], *sizes, *numbers]
        share = "-" if row["occupancy"] is None else f"{row['occupancy']:.0%}"
        assert line.split()[-1] == share


def test_kernels_differ_by_dtype_and_architecture():
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")

    def registers(arch, dtype):
        rows = done("info", "--kernels", "--arch", arch, "--dtype", dtype, "--json").splitlines()
        return [json.loads(line)["registers"] for line in rows]

    half = registers("sm_90", "float16")
    assert half != registers("sm_75", "float16") and half != registers("sm_90", "float32")


def test_info_kernels_of_an_unknown_architecture():
    code, _, err = call("info", "--kernels", "--arch", "sm_12345")
    assert code == 1 and "sm_12345" in err and "sm_90" in err


def test_compile_refuses_an_unknown_architecture(tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    environment = PLAIN_ENV | {"GPT2CUPY_CACHE_DIR": str(tmp_path)}
    failed = cli("compile", "--arch", "sm_12345", env=environment)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, "no bar without a terminal"
    assert failed.stderr.startswith("gpt2cupy: NVRTC")
    assert not list(tmp_path.iterdir())


def on_terminal(*arguments: str, env: dict[str, str]) -> tuple[int, str]:
    """Exit code, and what a terminal on stderr shows."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 25, 300, 0, 0))  # rows, columns
    try:
        ended = cli(
            *arguments, env=env, capture_output=False, stdout=subprocess.DEVNULL, stderr=slave
        )
        return ended.returncode, os.read(master, 65536).decode()
    finally:
        os.close(slave)
        os.close(master)


def test_compile_shows_a_bar_on_a_terminal(tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    environment = PLAIN_ENV | {"GPT2CUPY_CACHE_DIR": str(tmp_path)}
    code, shown = on_terminal("compile", "--arch", "sm_12345", env=environment)
    assert code == 1 and re.search(r"0%\|.*\| 0/\d+ ", shown)
    assert re.search(r"\n[^\n]*gpt2cupy:[^\n]* NVRTC", shown), "the error has a line of its own"


def test_compile_counts_what_it_made(monkeypatch, tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    from gpt2cupy.ops import compiler

    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_source", lambda source, options: b"cubin")
    shown = done("compile", "--arch", "sm_80", "--arch", "sm_90")
    made = len(list(tmp_path.iterdir()))
    assert shown == f"{made} cubins for sm_80, sm_90 in {tmp_path}\n"
    assert made == 2 * len(list(compiler.variants()))


# -- how a command ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("generate", "a", "--model", "/no/such/folder"), "/no/such/folder"),
        (("generate", "--file", "two\nlines"), "two lines"),
        (("generate", "a", "--temperature", "-1"), "temperature"),
        (("generate", "a", "--max-new-tokens", "100000"), "context"),
        (("generate", "a", "--n", "0"), "n=0"),
        (("generate", "a", "--dtype", "int4"), "int4"),
        (("generate", "a", "--device", "tpu"), "tpu"),
        (("generate", "--file", "/no/such/file"), "/no/such/file"),
        (("generate", "--file", "/"), "directory"),
        (("score", "a", "--window", "0"), "window"),
        (("tokenize", "a", "--model", "/no/such/folder"), "/no/such/folder"),
        (("info", "--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_an_error_is_one_line_on_stderr(arguments, says):
    device = () if {"--device", "tokenize"} & set(arguments) else CPU
    quiet = () if arguments[0] in ("info", "tokenize") else ("--quiet",)
    failed = cli(*arguments, *device, *quiet)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert says in failed.stderr and failed.stderr.startswith("gpt2cupy: ")
    assert failed.stderr.count("\n") == 1


def test_text_that_is_not_utf8_names_the_byte(tmp_path):
    (tmp_path / "text").write_bytes(b"abc\xff")
    for arguments, stdin in (
        (("--file", str(tmp_path / "text")), None),
        (("-",), b"abc\xff"),
    ):
        code, out, err = call("tokenize", *arguments, stdin=stdin)
        assert code == 1 and out == "" and "byte 3 is not UTF-8" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--no-such-option"),
        ("no-such-command",),
        ("generate", "a", "--top-k", "many"),
        ("generate", "a", "--gemv", "theirs"),
        ("generate", "a", "--file", "README.md"),
        ("generate", "a", "--logprobs", "3"),
        ("tokenize", "a", "b"),
        ("tokenize", "--decode", "--special", "1"),
        ("info", "--arch", "sm_90"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    code, out, err = call(*arguments)
    assert code == 2 and out == "" and "Usage" in err


def test_wrong_usage_as_a_process():
    failed = cli("generate", "--no-such-option")
    assert (failed.returncode, failed.stdout) == (2, "") and "Traceback" not in failed.stderr


def test_a_compilers_log_goes_to_a_file(monkeypatch, tmp_path):
    def refuse(*given, **options):
        raise CompileError("NVRTC refused the source:\nx.cu(1): error", where="x.cu", remedy="Do.")

    monkeypatch.setattr("gpt2cupy.lm.load", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = call("generate", "a", *CPU)
    assert code == 1 and err.count("\n") == 1
    (log,) = tmp_path.iterdir()
    assert err == f"gpt2cupy: NVRTC refused the source (x.cu). Do. The log: {log}\n"
    assert "x.cu(1): error" in log.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert "x.cu(1): error" in call("generate", "a", *CPU)[2], "shown where it cannot be kept"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "ROMEO:", *SHORT, "--quiet"),
        ("generate", "ROMEO:", *SHORT, "--quiet", "--json"),
        ("tokenize", "a"),
        ("info", *CPU),
        ("--version",),
    ],
)
def test_a_reader_that_went_away(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = cli(*arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_help_to_a_reader_that_went_away_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = cli("--help", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert ended.returncode != 0 and ended.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        ended = cli("tokenize", "a", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "No space left" in ended.stderr


def test_ctrl_c_while_reading():
    command = [*CLI, "tokenize", "-"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        # More than a pipe holds: when this returns, the command is reading.
        child.stdin.write(b"a" * (1 << 20))
        child.stdin.flush()
        for _ in range(10):
            # A signal that arrives between two reads is seen only after the second.
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
                break
        assert child.returncode == 130
        assert child.stderr.read() == b"" == child.stdout.read()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()


def test_ctrl_c_in_the_middle_of_a_text(monkeypatch):
    def stream(self, prompt, params):
        yield from LanguageModel.generate(self, prompt, max_new_tokens=0).tokens
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "stream", stream)
    code, out, err = call("generate", "ROMEO:", *SHORT, "--quiet")
    assert (code, out, err) == (130, "ROMEO:", "")


def test_ctrl_c_before_the_command_begins():
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from gpt2cupy.cli import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (130, b"")


# -- colour and warnings -------------------------------------------------------------------------


def test_colour_only_on_a_terminal():
    arguments = ("tokenize", "--decode", "x")
    assert "\033" not in cli(*arguments).stderr
    code, shown = on_terminal(*arguments, env=PLAIN_ENV | {"TERM": "xterm"})
    assert code == 1 and "\033[31mgpt2cupy:\033[0m 'x'" in shown
    for plain in ({"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
        code, shown = on_terminal(*arguments, env=PLAIN_ENV | plain)
        assert code == 1 and "gpt2cupy: 'x'" in shown and "\033" not in shown


def test_usage_errors_have_no_colour_in_a_pipe():
    assert "\033" not in cli("generate", "--no-such-option").stderr


def test_warnings_are_lines_of_ours(monkeypatch):
    load = gpt2cupy.lm.load

    def warn(*given, **options):
        warnings.warn("kernels cannot be kept", RuntimeWarning, stacklevel=2)
        return load(*given, **options)

    monkeypatch.setattr("gpt2cupy.lm.load", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, _, err = call("generate", "a", *SHORT)
        assert "gpt2cupy: warning: kernels cannot be kept\n" in err and "RuntimeWarning" not in err
        assert call("generate", "a", *SHORT, "--quiet")[2] == ""
