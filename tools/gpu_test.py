"""Run the GPU tests and record what passed: bench/results/gpu-tests.json.

    python tools/gpu_test.py [--chip sm_75] [--out FILE] [options of pytest]

With --chip as an older chip would run them (tests/chips.py), into gpu-tests-sm_75.json.
"""

from __future__ import annotations

import argparse
import sys

import pytest

from gpt2cupy import record
from gpt2cupy.ops.device import sm_count


class Tally:
    """Counts outcomes and keeps the names of what failed or was skipped."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.skipped[report.nodeid] = str(reason)
        elif report.when == "call":
            self.passed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip")
    parser.add_argument("--out")
    args, rest = parser.parse_known_args()
    name = "gpu-tests"
    if args.chip:
        rest += ["--chip", args.chip]
        name += f"-{args.chip}"
    out = args.out or str(record.RESULTS / f"{name}.json")
    tally = Tally()
    code = pytest.main(["-m", "gpu", "-q", *rest], plugins=[tally])
    if tally.passed == 0:
        sys.exit("no GPU test ran: nothing is recorded")
    results = {"passed": tally.passed, "failed": tally.failed, "skipped": tally.skipped}
    if args.chip:
        results |= {"chip": args.chip, "sms": sm_count()}
    record.write(out, results, gpu=True)
    print(f"{tally.passed} passed, {len(tally.failed)} failed, {len(tally.skipped)} skipped")
    sys.exit(int(code))


if __name__ == "__main__":
    main()
