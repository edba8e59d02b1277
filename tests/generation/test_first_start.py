"""With an empty kernel cache all that the first tokens need is compiled at once, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gpt2cupy.record import ROOT


def events(channels: int, prompt: int) -> list[tuple[str, str]]:
    """(event, source and macros) of tests/support/first_start.py."""
    here = os.pathsep.join(
        [str(ROOT / "tests" / "support"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    )
    ran = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "support" / "first_start.py"),
            str(channels),
            str(prompt),
        ],
        env=os.environ | {"PYTHONPATH": here.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert lines.pop()["event"] == "token"
    return [(line["event"], f"{line['source']} {line['defines']}") for line in lines]


@pytest.mark.parametrize(("channels", "prompt"), [(768, 40), (256, 5), (1600, 5)])
def test_kernels_of_prompt_and_steps_are_requested_before_one_is_waited_for(channels, prompt):
    found = events(channels, prompt)
    first = next(i for i, (event, _) in enumerate(found) if event == "load")
    requested = {key for event, key in found[:first] if event == "request"}
    loaded = {key for event, key in found if event == "load"}
    assert requested == {key for event, key in found if event == "request"} == loaded
    # Both ways to run a step, which are measured; of the persistent one for this number of rows.
    steps = [key for key in requested if key.startswith("decode_step.cu")]
    assert len(steps) == 1 and "'BATCH': '1'" in steps[0]
    assert any(key.startswith("attention_decode_mma.cu") for key in requested)
    assert any(key.startswith("attention_prefill_mma.cu") for key in requested)
    assert len(requested) <= 11
