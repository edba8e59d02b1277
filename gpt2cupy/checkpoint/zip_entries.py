"""Where the entries of a zip archive lie, if they are stored as they are.

The directory at the end is believed only as far as it can be checked: entries
are stored without compression, lie inside the file before the directory, do not
overlap, and bear the same name where they begin. So nothing is ever unpacked.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_END = struct.Struct("<4s4H2IH")
_END64_PLACE = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MAX_DIRECTORY = 4 << 20
_UNKNOWN = 0xFFFFFFFF


class ZipRefusedError(ValueError):
    """An archive that is damaged or has entries that are not stored plainly."""


def entries(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """(offset, bytes) of every entry by its name.

    Raises
    ------
    ZipRefusedError
        If the archive is not as the module's first lines say.
    """
    count, start, length = _directory(file, size)
    file.seek(start)
    data = file.read(length)
    found: dict[str, tuple[int, int]] = {}
    place = 0
    for _ in range(count):
        if place + _ENTRY.size > len(data):
            raise ZipRefusedError("its directory is cut off")
        (magic, _, _, flags, method, *_, packed, whole, name_size, extra_size, comment_size,
         disk, _, _, offset) = _ENTRY.unpack_from(data, place)  # fmt: skip
        place += _ENTRY.size
        name = data[place : place + name_size]
        extra = data[place + name_size : place + name_size + extra_size]
        place += name_size + extra_size + comment_size
        if magic != b"PK\1\2" or place > len(data) or disk not in (0, 0xFFFF):
            raise ZipRefusedError("its directory is damaged")
        whole, packed, offset = _wide(extra, [whole, packed, offset])
        if method or packed != whole:
            raise ZipRefusedError(f"the entry {name[:80]!r} is compressed")
        if flags & 1:
            raise ZipRefusedError(f"the entry {name[:80]!r} is encrypted")
        begin = _begin(file, offset, name)
        if begin + whole > start:
            raise ZipRefusedError(f"the entry {name[:80]!r} reaches outside the archive")
        text = name.decode("utf-8", "replace")
        if text in found:
            raise ZipRefusedError(f"the entry {name[:80]!r} stands twice")
        found[text] = begin, whole
    if place != len(data):
        raise ZipRefusedError("its directory has another length than it says")
    end = 0
    for begin, whole in sorted(found.values()):
        if begin < end:
            raise ZipRefusedError("two of its entries overlap")
        end = begin + whole
    return found


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of entries, and where the directory begins and how long it is."""
    tail_start = max(0, size - _END.size - 0xFFFF - _END64_PLACE.size)
    file.seek(tail_start)
    tail = file.read(size - tail_start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise ZipRefusedError("the end of the archive is missing")
    _, disk, _, _, count, length, start, comment = _END.unpack_from(tail, at)
    if disk not in (0, 0xFFFF) or at + _END.size + comment != len(tail):
        raise ZipRefusedError("the end of the archive is damaged")
    before = at - _END64_PLACE.size
    if before >= 0 and tail[before : before + 4] == b"PK\6\7":
        place = _END64_PLACE.unpack_from(tail, before)[2]
        file.seek(min(place, size))
        end = file.read(_END64.size)
        if len(end) != _END64.size or end[:4] != b"PK\6\6":
            raise ZipRefusedError("the end of the archive is damaged")
        count, length, start = _END64.unpack(end)[7:]
    if length > _MAX_DIRECTORY or start + length > size:
        raise ZipRefusedError("its directory lies outside the file or is too large")
    return count, start, length


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Sizes and offset, those that do not fit 32 bits from the extra field of zip64."""
    place = 0
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, place)
        body = extra[place + 4 : place + 4 + size]
        place += 4 + size
        if kind == 1:
            wide = [body[i : i + 8] for i in range(0, len(body) - 7, 8)]
            for index, value in enumerate(values):
                if value == _UNKNOWN and wide:
                    values[index] = int.from_bytes(wide.pop(0), "little")
    return values


def _begin(file: BinaryIO, offset: int, name: bytes) -> int:
    """Where the bytes of an entry begin, behind its local header."""
    if offset >= 2**62:
        raise ZipRefusedError(f"the entry {name[:80]!r} lies outside the archive")
    file.seek(offset)
    head = file.read(_LOCAL.size + len(name))
    if len(head) < _LOCAL.size + len(name) or head[:4] != b"PK\3\4":
        raise ZipRefusedError(f"the entry {name[:80]!r} is not where the directory says")
    *_, name_size, extra_size = _LOCAL.unpack_from(head)
    if name_size != len(name) or head[_LOCAL.size :] != name:
        raise ZipRefusedError(f"the entry {name[:80]!r} has another name where it begins")
    return offset + _LOCAL.size + name_size + extra_size
