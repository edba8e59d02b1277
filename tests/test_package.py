"""The package from outside: what importing loads, and the manners of the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import gpt2cupy
from gpt2cupy.record import ROOT

HEAVY = ("cupy", "torch", "huggingface_hub", "transformers", "tiktoken", "nvmath")
CLI = (sys.executable, "-m", "gpt2cupy.cli")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_importing_loads_nothing_heavy():
    loaded = python(f"import gpt2cupy, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "[]"


def test_the_cpu_needs_no_gpu_library():
    needless = [name for name in HEAVY if name != "tiktoken"]
    code = (
        "import gpt2cupy, sys\n"
        "with gpt2cupy.load(device='cpu') as lm: lm.generate('a', max_new_tokens=2)\n"
        f"print([m for m in {needless} if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_every_public_name_is_there():
    assert all(getattr(gpt2cupy, name) is not None for name in gpt2cupy.__all__)
    assert dir(gpt2cupy) == sorted(gpt2cupy.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = gpt2cupy.nothing


def test_version():
    shown = cli("--version")
    assert (shown.returncode, shown.stdout) == (0, f"gpt2cupy {gpt2cupy.__version__}\n")


def test_generate_writes_text_to_stdout_and_the_rest_to_stderr():
    arguments = ("generate", "ROMEO:", "--device", "cpu", "--max-new-tokens", "5", "--seed", "1")
    loud, quiet = cli(*arguments), cli(*arguments, "--quiet")
    assert loud.returncode == quiet.returncode == 0
    assert loud.stdout == quiet.stdout and loud.stdout.startswith("ROMEO:")
    assert "float32 on cpu" in loud.stderr and "5 tokens (length)" in loud.stderr
    assert quiet.stderr == ""


@pytest.mark.parametrize(
    "options, says",
    [
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--temperature", "-1"), "temperature"),
        (("--max-new-tokens", "100000"), "context"),
        (("--dtype", "int4"), "int4"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_an_error_is_one_line_on_stderr(options, says):
    device = () if "--device" in options else ("--device", "cpu")
    failed = cli("generate", "a", *device, "--quiet", *options)
    assert failed.returncode == 1
    assert says in failed.stderr and failed.stderr.startswith("gpt2cupy: ")
    assert failed.stderr.count("\n") == 1


def test_an_unknown_option_is_exit_code_2():
    assert cli("generate", "--no-such-option").returncode == 2


def test_a_closed_pipe_ends_quietly():
    command = [*CLI, "generate", "ROMEO:", "--device", "cpu", "--quiet", "--max-new-tokens", "200"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.read(5) == b"ROMEO"
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode in (0, 141)


def test_info_names_what_would_run():
    shown = cli("info", "--device", "cpu")
    assert shown.returncode == 0
    for label in ("versions", "device", "kernel cache", "weights", "cache", "decode state"):
        assert re.search(rf"^{label} ", shown.stdout, re.MULTILINE), label


def test_compile_refuses_an_unknown_architecture(tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    failed = subprocess.run(
        [*CLI, "compile", "--arch", "sm_12345"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"GPT2CUPY_CACHE_DIR": str(tmp_path)},
    )
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert not list(tmp_path.iterdir())


def test_environment_variables_are_few_and_documented():
    sources = [
        path
        for folder in ("gpt2cupy", "cuda_src", "tests", "bench", "tools", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", "") and path.is_file()
    ]
    texts = [path.read_text(encoding="utf-8") for path in [*sources, ROOT / "Makefile"]]
    used = {name for text in texts for name in re.findall(r"\bGPT2CUPY_[A-Z_]+[A-Z]\b", text)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "GPT2CUPY_CACHE_DIR" in used and len(used) <= 5
    assert {name for name in used if f"| `{name}` |" not in readme} == set()
