"""Run the GPU tests and record what passed: bench/results/gpu-tests.json.

    python tools/gpu_test.py [--chip sm_75] [--out FILE] [options of pytest]

A test that fails is named at once, and a run that is stopped (Ctrl-C, or SIGTERM, as timeout(1)
sends it) writes what it has, marked as cut off. With --chip as an older chip would run them
(tests/support/chips.py), into gpu-tests-sm_75.json. Of a part of them (-k, files) the record says
how many of the GPU tests did not run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

import pytest

from gpt2cupy import record
from gpt2cupy.ops.core.device import sm_count


class Tally:
    """Counts outcomes and keeps the names of what failed or was skipped."""

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self.cut_off = False
        self.passed = 0
        self.failed: list[str] = []
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran.add(report.nodeid)
        if report.failed:
            self.failed.append(report.nodeid)
            print(f"\nFAILED {report.nodeid} ({report.when})", flush=True)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.skipped[report.nodeid] = str(reason)
        elif report.when == "call":
            self.passed += 1

    def pytest_testnodedown(self, node: Any, error: object) -> None:
        # A worker of xdist says what it loaded (tests/conftest.py); one that crashed does not.
        if "loaded" in (said := getattr(node, "workeroutput", {})):
            record.add_loaded(said["loaded"])

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        # By --maxfail: an interrupt where xdist runs the tests.
        self.cut_off = bool(session.shouldfail) or exitstatus == pytest.ExitCode.INTERRUPTED


class Collected:
    """The names of all GPU tests.

    pytest's own count of what is deselected holds tests of the CPU too, and xdist does not tell it.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = {item.nodeid for item in session.items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip")
    parser.add_argument("--out")
    args, rest = parser.parse_known_args()
    if any(option.startswith("-n") for option in rest):
        # Workers have a core each; where a plugin imports NumPy before tests/conftest.py, only
        # what they inherit keeps the threads of their BLAS libraries from waiting for each other.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    name = "gpu-tests"
    gpu = ["-m", "gpu"]
    if args.chip:
        gpu += ["--chip", args.chip]
        name += f"-{args.chip}"
    out = args.out or str(record.RESULTS / f"{name}.json")
    everything, tally = Collected(), Tally()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: pytest sums up
    if code := pytest.main([*gpu, "--collect-only", "-qqq"], plugins=[everything]):
        sys.exit(f"the GPU tests cannot be collected: pytest ends with {int(code)}")
    code = pytest.main([*gpu, "-q", *rest], plugins=[tally])
    if tally.passed == 0:
        sys.exit("no GPU test ran: nothing is recorded")
    results = {"passed": tally.passed, "failed": tally.failed, "skipped": tally.skipped}
    results["not_run"] = len(everything.names - tally.ran)
    if args.chip:
        results |= {"chip": args.chip, "sms": sm_count()}
    record.write(out, results, gpu=True, complete=not tally.cut_off)
    counts = [f"{tally.passed} passed", f"{len(tally.failed)} failed"]
    counts += [f"{len(tally.skipped)} skipped", f"{results['not_run']} not run"]
    print(", ".join(counts))
    sys.exit(int(code))


if __name__ == "__main__":
    main()
