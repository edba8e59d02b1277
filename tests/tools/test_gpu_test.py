"""tools/gpu_test.py: a record of a part of the GPU tests says so, and so does its table."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gpt2cupy import record

sys.path.insert(0, str(record.ROOT / "bench"))
from bench.report.gpu_test_tables import gpu_tests

TOOL = record.ROOT / "tools" / "gpu_test.py"
# The tool as it is, on a machine without a GPU: only what it would ask of one is put in.
START = f"""
import runpy, sys
from gpt2cupy import record
record.environment = lambda gpu: {{"gpu": "NVIDIA H200"}}
sys.argv[0] = {str(TOOL)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SUITE = """
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_product(dtype): pass
def test_skipped(): pytest.skip("why")
def test_broken(): assert BROKEN
"""
ON_CPU = "def test_cpu(): pass\n"


@pytest.fixture
def suite(tmp_path):
    """Eight GPU tests in two files, and one of the CPU."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\ntestpaths = tests\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_ops.py").write_text(SUITE.replace("BROKEN", "True"))
    (tmp_path / "tests" / "test_model.py").write_text(SUITE.replace("BROKEN", "True"))
    (tmp_path / "tests" / "test_cpu.py").write_text(ON_CPU)
    return tmp_path


def run(suite, *options):
    command = [sys.executable, "-c", START, f"--out={suite / 'gpu.json'}", *options]
    environment = {"PYTHONPATH": str(record.ROOT), "PATH": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=suite, env=environment)


def recorded(suite, *options):
    ended = run(suite, *options)
    assert (suite / "gpu.json").exists(), ended.stdout + ended.stderr
    return json.loads((suite / "gpu.json").read_text())


@pytest.mark.parametrize("spread", [(), ("-n", "2")], ids=["one process", "xdist"])
@pytest.mark.parametrize(
    ("options", "passed", "not_run"),
    [
        ((), 6, 0),
        (("-k", "not bfloat16"), 4, 2),
        (("tests/test_ops.py",), 3, 4),
        (("-k", "not bfloat16", "tests/test_ops.py"), 2, 5),
    ],
)
def test_what_did_not_run_is_counted(suite, spread, options, passed, not_run):
    entry = recorded(suite, *spread, *options)
    results = entry["results"]
    assert (results["passed"], results["not_run"]) == (passed, not_run)
    assert entry["complete"] and results["failed"] == []
    assert set(results["skipped"].values()) == {"Skipped: why"}


@pytest.mark.parametrize("spread", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_the_record_depends_on_what_the_tests_loaded(suite, spread):
    conftest = (record.ROOT / "tests" / "conftest.py").read_text()
    hook = conftest[conftest.index("def pytest_sessionfinish") :].partition("\n\n\n")[0]
    (suite / "conftest.py").write_text("import pytest\n" + hook)
    uses = "from gpt2cupy import cache\n"
    (suite / "tests" / "test_model.py").write_text(uses + SUITE.replace("BROKEN", "True"))
    assert "gpt2cupy/cache.py" in recorded(suite, *spread)["files"]


@pytest.mark.parametrize("spread", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_a_run_that_stopped_at_a_failure_was_cut_off(suite, spread):
    (suite / "tests" / "test_model.py").write_text(SUITE.replace("BROKEN", "False"))
    entry = recorded(suite, *spread, "--maxfail=1")
    assert entry["results"]["failed"] == ["tests/test_model.py::test_broken"]
    assert not entry["complete"] and entry["results"]["not_run"] == 4


@pytest.mark.parametrize("spread", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_a_run_that_is_stopped_says_what_failed_and_keeps_the_rest(suite, spread):
    """Killed by timeout(1), say: the names of failures are not lost with the summary."""
    waiting = SUITE.replace("BROKEN", "False") + "def test_z(): import time; time.sleep(60)\n"
    (suite / "tests" / "test_model.py").write_text(waiting)
    command = [sys.executable, "-c", START, f"--out={suite / 'gpu.json'}", *spread]
    environment = {"PYTHONPATH": str(record.ROOT), "PATH": ""}
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": suite, "env": environment}
    with subprocess.Popen(command, **options) as process:
        for line in process.stdout:
            if line.startswith("FAILED"):
                break
        process.terminate()
        process.communicate(timeout=60)
    assert line.startswith("FAILED tests/test_model.py::test_broken (call)")
    found = json.loads((suite / "gpu.json").read_text())
    assert not found["complete"] and found["results"]["failed"] == [
        "tests/test_model.py::test_broken"
    ]
    assert found["results"]["passed"] >= 1


def test_a_suite_that_cannot_be_collected_is_no_record(suite):
    (suite / "tests" / "test_model.py").write_text("import nothing_of_that_name")
    ended = run(suite, "tests/test_ops.py")
    assert ended.returncode == 1 and "cannot be collected" in ended.stderr
    assert not (suite / "gpu.json").exists()


def caption(command, **results):
    entry = {"date": "2026-01-02", "command": command, "environment": {"gpu": "NVIDIA H200"}}
    results = {"passed": 9, "failed": [], "skipped": {}} | results
    return gpu_tests(entry | {"results": results}).splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "results", "said"),
    [
        ("-n 15 --maxfail=40", {}, "."),
        ("-n 15 --maxfail=40", {"not_run": 0}, "."),
        (
            "-k 'not bfloat16'",
            {},
            ". Not all of the GPU tests, selected by -k 'not bfloat16'.",
        ),
        (
            "-k 'not bfloat16' tests/test_ops.py tests/test_model.py",
            {"not_run": 1234},
            ". Not all of the GPU tests, those of test_ops.py, test_model.py, "
            "selected by -k 'not bfloat16'; 1,234 did not run.",
        ),
        ("--deselect=x", {"not_run": 1}, ". Not all of the GPU tests; 1 did not run."),
    ],
)
def test_a_table_says_by_which_command_and_of_what(options, results, said):
    command = f"python tools/gpu_test.py {options}"
    assert caption(command, **results) == f"`{command}`{said}" + ("" if said.endswith(".") else ".")
