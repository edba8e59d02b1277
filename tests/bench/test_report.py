"""Documents equal their records, and a stale record is noticed."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys

import pytest
from synthetic_records import LISTS, SAYS, SYNTHETIC, TIMING

from gpt2cupy import record

sys.path.insert(0, str(record.ROOT / "bench"))
from bench.report import layout, peer_tables, profile_tables, tables


@pytest.fixture(scope="module")
def report():
    return importlib.import_module("bench.report.__main__")


def entry(results, files=("gpt2cupy/cache.py",)):
    return {
        "date": "2026-01-02",
        "command": "python bench/decode.py",
        "environment": {"gpu": "NVIDIA H200", "driver": "580.1", "cuda_driver": 13000},
        "files": {name: record.digest_file(record.ROOT / name) for name in files},
        "results": results,
    }


@pytest.fixture
def example(tmp_path):
    """A folder with one document and one record of a decode step."""
    row = {
        "model": "124M",
        "dtype": "float16",
        "batch": 4,
        "decode": "eager",
        "gemv": "ours",
        "steps": [{"context": 128, "step": TIMING, "host": TIMING | {"median_us": 512.0}}],
        "end_to_end": {"prompt": 32, "tokens": 200, "us_per_step": 1000.0},
    }
    results = {"weights": "random", "rows": [row]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "decode.json").write_text(json.dumps(entry(results)))
    (tmp_path / "README.md").write_text("A\n\n<!-- table: decode -->\n<!-- end -->\n\nB\n")
    return tmp_path


def run(folder, *options):
    command = [
        sys.executable,
        "-m",
        "bench.report",
        "--root",
        folder,
        "--results",
        folder / "results",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_documents_equal_their_records(report, capsys):
    assert report.update(record.ROOT, record.RESULTS, check=True) == 0, capsys.readouterr().out


def test_a_table_is_written_from_its_record(example):
    assert run(example).returncode == 0
    text = (example / "README.md").read_text()
    assert "| float16 | 4 | eager | - | 800 | 512 | 1,000 | 4,000 |" in text
    assert "NVIDIA" not in text, "the device stands once on a page, where the page wants it"
    assert text.startswith("A\n") and text.endswith("<!-- end -->\n\nB\n")
    assert run(example, "--check").returncode == 0


def test_a_changed_number_is_noticed(example):
    run(example)
    path = example / "README.md"
    path.write_text(path.read_text().replace("| 800 |", "| 700 |"))
    checked = run(example, "--check")
    assert checked.returncode == 1 and "README.md" in checked.stdout
    assert "| 700 |" in path.read_text(), "--check must change nothing"
    run(example)
    assert "| 800 |" in path.read_text()


def test_a_table_without_a_record_stays(example):
    path = example / "README.md"
    path.write_text("<!-- table: startup -->\nby hand\n<!-- end -->\n")
    checked = run(example, "--check")
    assert checked.returncode == 0 and "startup is left as it is" in checked.stderr
    assert "by hand" in path.read_text()


@pytest.mark.parametrize("option", ["--records", "--check", "--draw"])
@pytest.mark.parametrize("text", ["{", "[]", '{"date": "2026-01-02"}', "\xff"])
def test_a_damaged_record_is_named(example, option, text):
    (example / "results" / "gemv.json").write_bytes(text.encode("latin-1"))
    failed = run(example, option)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("report: ") and "gemv.json is no record" in failed.stderr
    assert failed.stderr.endswith("Take it from git again, or measure it again.\n")


@pytest.mark.parametrize("option", ["--records", "--check"])
def test_a_folder_of_records_that_is_not_there_is_an_error(example, option):
    failed = run(example, option, "--results", example / "nope")
    assert failed.returncode == 1 and failed.stderr.startswith("report: there is no folder")


def test_an_unknown_table_is_an_error(example):
    (example / "README.md").write_text("<!-- table: nothing -->\n<!-- end -->\n")
    checked = run(example)
    assert checked.returncode == 1 and "'nothing'" in checked.stderr


def test_stale_records(example):
    assert run(example, "--records", "--strict").returncode == 0
    path = example / "results" / "decode.json"
    written = json.loads(path.read_text())
    files = written["files"] | {"gpt2cupy/model.py": "0" * 64, "gpt2cupy/no_more.py": "0" * 64}
    path.write_text(json.dumps(written | {"files": files}))
    listed = run(example, "--records")
    assert listed.returncode == 0
    assert listed.stdout == (
        "decode           stale    NVIDIA H200, 2026-01-02: gpt2cupy/model.py, "
        "gpt2cupy/no_more.py (gone)\n"
    )
    assert run(example, "--records", "--strict").returncode == 1


def test_a_record_that_names_no_files_is_stale(example):
    path = example / "results" / "decode.json"
    written = json.loads(path.read_text())
    del written["files"]
    path.write_text(json.dumps(written | {"sources": ["cuda_src/*.cu"], "source_hash": "0" * 64}))
    listed = run(example, "--records", "--strict")
    assert listed.returncode == 1 and "2026-01-02: it does not say which files" in listed.stdout
    assert run(example).returncode == 0  # its tables are still made


@pytest.mark.parametrize("missing", [True, False])
def test_a_table_without_its_record_fails_the_release(example, missing):
    path = example / "README.md"
    path.write_text(path.read_text() + "<!-- table: naive -->\n<!-- end -->\n")
    if not missing:
        (example / "results" / "naive.json").write_text(json.dumps(entry({"rows": []})))
    listed = run(example, "--records")
    assert listed.returncode == 0
    assert ("naive            missing  README.md: naive" in listed.stdout) == missing
    assert run(example, "--records", "--strict").returncode == missing


def test_a_record_that_was_cut_off_fails_the_release(example):
    path = example / "results" / "decode.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False}))
    listed = run(example, "--records", "--strict")
    assert listed.returncode == 1 and "decode           cut off" in listed.stdout
    run(example)
    assert "The run was cut off: rows are missing." in (example / "README.md").read_text()


def test_tables_of_lists():
    made = {name: tables.TABLES[name][1](entry(LISTS[name])) for name in LISTS}
    assert "| plain | 163,840 | 3.20 | 0.80 | 1.53 |" in made["batch"]
    assert (
        "4,096 requests of 128 tokens on average, 128 new ones each, 256 at once" in made["batch"]
    )
    assert "| 12,000 | 9,000 | 990,000 | 40.0 |" in made["scoring"]
    assert "| 1 | 700 | - | - |" in made["scoring"]


@pytest.mark.parametrize(
    "name", [name for name, (source, _) in tables.TABLES.items() if source in SYNTHETIC]
)
def test_tables_of_what_only_a_gpu_measures(name):
    source, make = tables.TABLES[name]
    made = make(entry(SYNTHETIC[source]))
    widths = {line.count("|") for line in made.splitlines() if line.startswith("|")}
    assert len(widths) == (name != "profile-pictures")
    assert [text for text in SAYS.get(name, []) if text not in made] == []
    assert name in ("profile-lost", "profile-added") or "not asked for" not in made
    assert (made.endswith(".\n") and "NVIDIA" not in made) or name.startswith("gpu-tests")


def test_clocks_are_stated_where_the_record_has_them():
    record_ = entry(SYNTHETIC["gpu-tests"])
    record_["environment"] |= {"sm_clock_mhz": 1755, "max_sm_clock_mhz": 1980}
    made = layout.environment({"gpu-tests": record_})
    assert "NVIDIA H200, SMs at 1755 of 1980 MHz, memory at ? MHz; driver" in made


def test_what_nvidia_smi_says_goes_into_a_record(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program.write_text("#!/bin/sh\necho '580.1, 1755, 1980, [N/A]'\necho '580.1, 1, 1, 1'\n")
    program.chmod(0o755)
    found = {"driver": "580.1", "sm_clock_mhz": 1755, "max_sm_clock_mhz": 1980}
    assert record._nvidia_smi() == found
    program.write_text("#!/bin/sh\nexit 9\n")
    assert record._nvidia_smi() == {"driver": "unknown"}


def test_every_benchmark_has_a_section(report):
    """Every table that is not the README's stands in docs/."""
    marked = [
        name
        for page in report.documents(record.ROOT)
        for _, name, _ in report._MARKED.findall(page.read_text(encoding="utf-8"))
    ]
    assert set(marked) == {report.ENVIRONMENT, *report.SOURCES}


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/elsewhere/out/decode.json", "decode.json"),
        ("--out=/elsewhere/out/decode.json", "--out=decode.json"),
        (str(record.RESULTS / "decode.json"), "bench/results/decode.json"),
        ("out/decode.json", "out/decode.json"),
        ("--prompt=a = b", "'--prompt=a = b'"),
    ],
)
def test_a_record_names_no_folder_of_the_machine(monkeypatch, tmp_path, argument, shown):
    monkeypatch.setattr("sys.argv", [str(record.ROOT / "bench" / "decode.py"), argument])
    written = record.write(tmp_path / "record.json", {}, gpu=False)
    assert written["command"] == f"python bench/decode.py {shown}"


def test_the_tables_of_peers_join_their_records():
    found = {"peers": entry(SYNTHETIC["peers"]), "other": entry({})}
    made = peer_tables.peers(found)
    for said in (
        "| gpt2cupy | 1 | 100 (100 to 100) | 10,000 | 0.90 | 0.4 | 0.1 | 1.00 |",
        "| PyTorch step | 1 | 300 (300 to 300) | 3,333 | 4.00 | 2.2 | 58.5 | 3.00 |",
    ):
        assert said in made
    made = peer_tables.summary(found)
    # A size that was not measured has no column, and is named below.
    assert made.startswith("| engine | GPT-2 124M, tokens/s | gpt2cupy is faster by |\n")
    assert "| **gpt2cupy** | 10,000 |  |\n" in made
    assert "CUDA graph | 3,333 | 3.0 x |\n" in made
    assert "llama.cpp" not in made and "The others have not been timed at 1558M yet" in made
    large = json.loads(json.dumps(SYNTHETIC["peers"]))
    engines = large["rows"][0]["engines"]
    large["rows"][0]["model"] = "1558M"
    engines["llama.cpp"] = engines.pop("PyTorch step")
    made = peer_tables.summary(found | {"peers-1558M": entry(large)})
    size = "tokens/s | gpt2cupy is faster by |"
    assert made.startswith(f"| engine | GPT-2 124M, {size} GPT-2 1558M, {size}\n")
    assert "| **gpt2cupy** | 10,000 |  | 10,000 |  |\n" in made
    assert "flash attention | not measured |  | 3,333 | 3.0 x |\n" in made
    assert "no record of" not in made


def test_a_page_says_once_where_it_was_measured(example):
    path = example / "README.md"
    path.write_text(path.read_text() + "\n<!-- table: environment -->\n<!-- end -->\n")
    assert run(example).stderr == ""
    text = path.read_text()
    assert text.count("Measured on NVIDIA H200; driver 580.1, CUDA 13.0; 2026-01-02.") == 1
    path.write_text("<!-- table: decode -->\n<!-- end -->\n")
    assert "no table environment says" in run(example).stderr


def test_every_table_has_a_sentence_above_it(report):
    """A heading alone does not say what a table means."""
    bare = []
    for page in report.documents(record.ROOT):
        lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line]
        for above, line in itertools.pairwise(lines):
            if line.startswith("<!-- table: ") and above.startswith(("#", "|")):
                bare.append(f"{page.name}: {line}")
    assert bare == []


def test_environments_that_differ_are_told_apart():
    one, cpu = entry({}), entry({}) | {"environment": {"cpu": "A CPU"}}
    found = {"a": one, "b": one | {"date": "2026-01-05"}, "cpu": cpu}
    assert layout.environment(found) == (
        "Measured on NVIDIA H200; driver 580.1, CUDA 13.0; 2026-01-02 to 2026-01-05.\n\n"
        "Also measured on A CPU; 2026-01-02 (cpu.json).\n"
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("aten::addmm", "aten::addmm"),
        ("void gemvNSP_kernel<float, 1, P<float const>, float>(P<float const>)", "gemvNSP_kernel"),
        (
            "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, float>(int)",
            "gemvx::kernel",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, "
            "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>)",
            "vectorized_elementwise_kernel<CUDAFunctor_add>",
        ),
        (
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 3>(char*)",
            "CatArrayBatchedCopy",
        ),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("gemv_add_once_f32", "gemv_add_once_f32"),
    ],
)
def test_kernel_names_are_short(name, shown):
    assert layout.kernel(name) == shown


def test_kernels_of_one_name_are_one_row():
    row = {"self_cpu_percent": 1.0, "cpu_total_ms": 4.0, "self_cuda_ms": 3.0, "cuda_total_ms": 3.0}
    row |= {"self_cpu_ms": 2.0, "cpu_avg_us": 2000.0, "cuda_avg_us": 1500.0, "calls": 2}
    rows = [row | {"name": f"void k<{n}>(int)"} for n in (1, 2)]
    host = row | {"name": "cudaLaunchKernel", "self_cuda_ms": 0.0, "self_cpu_ms": 90.0}
    merged, last = profile_tables.by_kernel([host, *rows])
    assert last["name"] == "cudaLaunchKernel", "the longest on the GPU first"
    assert merged["name"] == "k" and merged["calls"] == 4 and merged["self_cuda_ms"] == 6.0
    assert (merged["cpu_avg_us"], merged["cuda_avg_us"]) == (2000.0, 1500.0)


@pytest.mark.parametrize("path", sorted(record.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_record_names_no_folder_of_a_machine(path):
    for word in json.loads(path.read_text())["command"].split():
        assert not word.rpartition("=")[2].startswith("/")
