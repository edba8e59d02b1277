"""Small runs on NumPy, and the same on a GPU that only pretends."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from builders import TINY
from pretended_gpu import PROMPT, SMALL, FakeCupti, Gpu, PretendedSession

from gpt2cupy import GPT2, profile


@pytest.fixture(scope="session")
def model():
    return GPT2.random(TINY, 0, device="cpu")


@pytest.fixture(scope="session")
def found(model):
    return profile.profile(model, PROMPT, SMALL)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(PretendedSession, "gpu", gpu, raising=False)
    monkeypatch.setattr(profile, "Session", PretendedSession)
    return gpu


@pytest.fixture
def cupti(gpu, monkeypatch):
    fake = FakeCupti(gpu)
    monkeypatch.setitem(sys.modules, "cupti", SimpleNamespace(cupti=fake))
    return fake
