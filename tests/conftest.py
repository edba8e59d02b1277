"""Which backends there are: NumPy always, CuPy where a GPU can be used."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

# How long an example takes depends on what else the machine does; no test asks for speed.
hypothesis.settings.register_profile("gpt2cupy", deadline=None)
hypothesis.settings.load_profile("gpt2cupy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chip", help="run the GPU tests as this older chip would (tests/support/chips.py)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if name := config.getoption("--chip"):
        from chips import CHIPS, pretend

        if name not in CHIPS:
            raise pytest.UsageError(f"--chip {name}: known are {', '.join(CHIPS)}")
        pretend(name)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # What a worker of xdist loaded, for the record that its controller writes (tools/gpu_test.py).
    if hasattr(session.config, "workeroutput"):
        from gpt2cupy import record

        session.config.workeroutput["loaded"] = record.loaded()


def _gpu_reason() -> str:
    """Why there is no usable GPU, or nothing."""
    try:
        from gpt2cupy.ops.core.device import cupy_module

        cupy_module()
    except Exception as error:
        return str(error)
    return ""


def _narrow_on_numpy(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("xp") == "numpy" and params.get("dtype", "float32") != "float32"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The NumPy engine holds float32 only: the other dtypes are the GPU's cases.
    idle = [item for item in items if _narrow_on_numpy(item)]
    if idle:
        config.hook.pytest_deselected(items=idle)
        items[:] = [item for item in items if item not in set(idle)]
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and (reason := _gpu_reason()):
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {reason}"))


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest):
    """NumPy, and CuPy as a gpu test."""
    return pytest.importorskip(request.param)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest):
    """Each dtype of a model; on NumPy float32 alone."""
    from error_rule import DTYPES

    return DTYPES[request.param]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Puts a stand-in for CuPy in its place: a machine with these GPUs and this driver."""
    from fake_cupy import stand_in

    yield from stand_in(monkeypatch)
