"""Which backends there are: NumPy always, CuPy where a GPU can be used."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

# Workers have a core each: threads of their BLAS libraries would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ and "numpy" not in sys.modules:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# How long an example takes depends on what else the machine does; no test asks for speed.
hypothesis.settings.register_profile("gpt2cupy", deadline=None)
hypothesis.settings.load_profile("gpt2cupy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chip", help="run the GPU tests as this older chip would (tests/support/chips.py)"
    )
    parser.addoption(
        "--kills", type=int, default=10, help="how often a batch is killed; 100 in a release check"
    )
    parser.addoption("--gpu", type=int, default=0, help="the GPU that tests take as the first one")


def pytest_configure(config: pytest.Config) -> None:
    if name := config.getoption("--chip"):
        from chips import CHIPS, pretend

        if name not in CHIPS:
            raise pytest.UsageError(f"--chip {name}: known are {', '.join(CHIPS)}")
        pretend(name)
    if number := config.getoption("--gpu"):
        _take_gpu(number)


def _take_gpu(number: int) -> None:
    """Let GPU ``number`` stand for the first one, on which every thread begins."""
    from gpt2cupy import loading
    from gpt2cupy.ops.core.device import cupy_module

    usable, run = loading._usable, threading.Thread.run
    there = cupy_module().cuda.Device(number)

    def run_there(thread: threading.Thread) -> None:
        there.use()
        run(thread)

    loading._usable = lambda index: usable(index or number)
    threading.Thread.run = run_there
    there.use()


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


LARGEST_ON_NUMPY = 1 << 20  # weights of a product


def _only_for_gpus(item: pytest.Item) -> bool:
    """Whether a case on NumPy is like another one.

    The NumPy engine holds float32 only, has no library beside itself to multiply with, and no
    kernels that large products take and small ones do not.
    """
    params = getattr(getattr(item, "callspec", None), "params", {})
    if params.get("xp") != "numpy":
        return False
    weights = params.get("m", 0) * params.get("k", 0)
    return (
        params.get("dtype", "float32") != "float32"
        or params.get("backend") == "cublas"
        or weights > LARGEST_ON_NUMPY
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    idle = [item for item in items if _only_for_gpus(item)]
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


@pytest.fixture(autouse=True)
def fresh_plans():
    """A call of an op is not found again from another test, which may have changed its kernels."""
    if (tape := sys.modules.get("gpt2cupy.ops.core.tape")) and tape.THREAD.plans:
        tape.THREAD.plans = {}
