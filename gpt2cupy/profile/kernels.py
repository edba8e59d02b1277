"""Every kernel with its begin and end, through CUPTI (NVIDIA's cupti-python)."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np

from ..errors import DeviceError
from .measure import Session
from .timeline import Timeline, middle_half

_BUFFER = 8 << 20  # bytes that CUPTI fills before it hands records over
_FLUSH_FORCED = 1


class Record(NamedTuple):
    """One kernel: nanoseconds on CUPTI's clock."""

    start: int
    end: int
    name: str


class Cupti:
    """Collects kernel records while it is open.

    Raises
    ------
    ImportError
        If cupti-python is not installed.
    DeviceError
        If CUPTI cannot be used, as when another profiler holds it.
    """

    def __init__(self) -> None:
        from cupti import cupti

        self._cupti = cupti
        self._kind = cupti.ActivityKind.CONCURRENT_KERNEL
        self._records: list[Record] = []
        try:
            cupti.activity_enable(self._kind)
            cupti.activity_register_callbacks(lambda: (_BUFFER, 0), self._completed)
        except Exception as error:
            raise unusable(error) from error

    def _completed(self, activities: list[Any]) -> None:
        for each in activities:
            if each.kind == self._kind:
                self._records.append(Record(each.start, each.end, each.name))

    def take(self) -> list[Record]:
        """The kernels that ended since the last call; the device must be idle."""
        self._cupti.activity_flush_all(_FLUSH_FORCED)
        taken, self._records = sorted(self._records), []
        return taken

    def close(self) -> None:
        """Let go of CUPTI: kernels run unobserved again, and another tool may take it."""
        # What was recorded is good even where CUPTI cannot be left cleanly.
        with contextlib.suppress(Exception):
            self._cupti.activity_disable(self._kind)
            self._cupti.finalize()


def unusable(error: BaseException | str) -> DeviceError:
    return DeviceError(
        f"CUPTI cannot be used: {error}",
        where="kernel times",
        remedy="Only one tool may hold it: run without nsys, ncu or another profiler, or take "
        "--no-cupti. CUPTI must not be newer than the driver allows.",
    )


def by_kernel(session: Session, runs: int) -> tuple[Timeline, int]:
    """``runs`` runs with every kernel recorded, and how many were lost.

    A first step, launch by launch, tells which kernels a launch makes: a
    library's GEMM may be several.

    Raises
    ------
    ImportError, DeviceError
        As :class:`Cupti`, and if no run's records are complete.
    """
    cupti = Cupti()
    try:
        with session.active():
            return _by_kernel(session, cupti, runs)
    except DeviceError:
        raise
    except (
        Exception
    ) as error:  # cupti-python raises several kinds, and which depends on its version
        raise unusable(error) from error
    finally:
        cupti.close()


def _by_kernel(session: Session, cupti: Cupti, runs: int) -> tuple[Timeline, int]:
    tokens = session.settings.tokens
    session.begin()
    session.synchronize()
    cupti.take()
    owner, names = [], []
    for index, op in enumerate(session.ops):
        for part, launch in enumerate(op.launches):
            launch()
            session.synchronize()
            for record in cupti.take():
                owner.append((index, part))
                names.append(record.name)
    if not names:
        raise unusable("it recorded no kernel")
    # A graph shows its kernels if it was captured while they are recorded.
    session.renew_decoder()
    found, seconds, lost = [], [], 0
    for _ in range(runs):
        session.begin()
        session.synchronize()
        cupti.take()
        # By the clock of the unprofiled steps too: what recording costs is their difference, and
        # the records have to account for these same steps.
        between_events = session.steps()[0]
        records = cupti.take()
        if [record.name for record in records] != names * tokens:
            lost += 1
            continue
        found += records
        seconds.append(between_events[1:])  # the first follows no other
    if not found:
        raise unusable("the records of every run are incomplete")
    shape = (-1, len(names))
    start_us = np.array([r.start for r in found], np.int64) - found[0].start
    end_us = np.array([r.end for r in found], np.int64) - found[0].start
    times = np.concatenate(seconds)
    timeline = Timeline(
        start_us.reshape(shape) / 1e3,
        end_us.reshape(shape) / 1e3,
        owner,
        names,
        "cupti",
        float(times[middle_half(times)].mean()) * 1e6,
    )
    return timeline, lost
