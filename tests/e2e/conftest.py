"""Servers that several tests share."""

from __future__ import annotations

import pytest

pytest.importorskip("zmq")
pytest.importorskip("uvicorn")

from server_process import Served


@pytest.fixture(scope="session")
def served():
    """The embedded model on NumPy, 4 slots, short times."""
    options = ("--slots", "4", "--receive-timeout", "1.5", "--slow-reader-timeout", "1")
    with Served(*options, "--max-body", "100000") as server:
        yield server


@pytest.fixture(scope="session")
def mocked():
    """A mock engine of 256 slots, 2 fronts."""
    options = ("--engine", "mock:2000", "--slots", "256", "--workers", "2")
    with Served(*options, "--slow-reader-timeout", "1") as server:
        yield server
