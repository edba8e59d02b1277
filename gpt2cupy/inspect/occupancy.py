"""What a kernel takes of a multiprocessor (SM): read from its cubin, and how many blocks fit.

Works without a GPU. A cubin is an ELF file; NVIDIA documents neither its
``.nv.info`` records nor their numbers, so the tests compare what is read here
with the compiler's own words (``--ptxas-options=-v``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import CompileError

WARP = 32
REGISTERS = 65536  # of an SM, on every architecture from sm_75 to sm_120

# Records of .nv.info: (format, attribute, size or value); only format 4 has a payload.
_WITH_PAYLOAD = 4
_REGISTERS, _FRAME, _MAX_THREADS = 0x2F, 0x11, 0x05


@dataclass(frozen=True)
class Resources:
    """What one entry of a cubin takes.

    Attributes
    ----------
    registers : int
        Per thread.
    local_bytes : int
        Local memory per thread: spilled registers, and arrays that could not
        stay in registers. 0 means that nothing is spilled.
    shared_bytes : int
        Static shared memory per block.
    max_threads : int or None
        Threads of a block by ``__launch_bounds__``.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    max_threads: int | None


@dataclass(frozen=True)
class Limits:
    """What an SM of one architecture has.

    Attributes
    ----------
    warps, blocks : int
        Resident at once.
    shared_bytes : int
        Shared memory of all resident blocks.
    reserved_bytes : int
        Shared memory that the system takes of each block.
    granule : int
        Shared memory is given out in multiples of this.
    """

    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int = 1024
    granule: int = 128


# CUDA Programming Guide, "Technical Specifications per Compute Capability"; cuda/__device/
# arch_traits.h of NVIDIA's CCCL has the same numbers.
LIMITS = {
    "sm_75": Limits(32, 16, 64 << 10, reserved_bytes=0, granule=256),
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_86": Limits(48, 16, 100 << 10),
    "sm_89": Limits(48, 24, 100 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
    "sm_100": Limits(64, 32, 228 << 10),
    "sm_120": Limits(48, 24, 100 << 10),
}


def blocks_per_sm(arch: str, threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks of ``threads`` threads that are resident on one SM at once.

    Parameters
    ----------
    arch : str
        One of ``LIMITS``.
    threads : int
        Of a block.
    registers : int
        Per thread.
    shared_bytes : int
        Per block, static and dynamic.
    """
    limits = LIMITS[arch]
    warps = -(-threads // WARP)
    # Registers are given out per warp in multiples of 256, from one of the SM's four quarters.
    per_warp = _round_up(registers * WARP, 256)
    by_registers = REGISTERS // 4 // per_warp * 4 // warps if registers else limits.blocks
    taken = _round_up(shared_bytes + limits.reserved_bytes, limits.granule)
    by_shared = limits.shared_bytes // taken if taken else limits.blocks
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Section(NamedTuple):
    name: str
    size: int
    offset: int


def read_cubin(path: Path) -> dict[str, Resources]:
    """What every entry of a cubin takes, by its name.

    Raises
    ------
    CompileError
        If the file is not a cubin whose records can be read.
    """
    try:
        return dict(_entries(path.read_bytes()))
    except (OSError, struct.error, ValueError, KeyError, IndexError) as error:
        raise CompileError(
            "this is no cubin that can be read",
            where=str(path),
            remedy="Delete the file; it is compiled again when it is needed.",
        ) from error


def _entries(data: bytes) -> Iterator[tuple[str, Resources]]:
    sections = _sections(data)
    sizes = {section.name: section.size for section in sections}
    contents = {s.name: data[s.offset : s.offset + s.size] for s in sections}
    names = _symbols(contents)
    # A source may have no entry for an old chip, and then its cubin no records.
    registers: dict[str, int] = {}
    frames: dict[str, int] = {}
    for attribute, payload in _records(contents.get(".nv.info", b"")):
        if attribute in (_REGISTERS, _FRAME):
            symbol, value = struct.unpack("<II", payload)
            (registers if attribute == _REGISTERS else frames)[names[symbol]] = value
    # From sm_90 on a kernel's section includes what the system reserves of its block.
    reserved = 1024 if ".nv.shared.reserved.0" in sizes else 0
    for section in sections:
        entry = section.name.removeprefix(".text.")
        if entry == section.name:
            continue
        bounds = [
            struct.unpack("<III", payload)
            for attribute, payload in _records(contents.get(f".nv.info.{entry}", b""))
            if attribute == _MAX_THREADS
        ]
        shared = sizes.get(f".nv.shared.{entry}", 0)
        threads = bounds[0][0] * bounds[0][1] * bounds[0][2] if bounds else None
        static = shared - reserved if shared else 0
        yield entry, Resources(registers[entry], frames[entry], static, threads)


def _sections(data: bytes) -> list[_Section]:
    """Section headers of a 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit ELF file")
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
    strings = headers[names_at][4]
    return [
        _Section(_string(data, strings + name), length, offset)
        for name, _, _, _, offset, length in headers
    ]


def _symbols(contents: dict[str, bytes]) -> dict[int, str]:
    """Names of the symbols by their index."""
    table = contents[".symtab"]
    return {
        index: _string(contents[".strtab"], name)
        for index, (name, *_) in enumerate(struct.iter_unpack("<I20x", table))
    }


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, payload) of a .nv.info section."""
    place = 0
    while place < len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, place)
        place += 4
        if kind == _WITH_PAYLOAD:
            yield attribute, data[place : place + size]
            place += size
