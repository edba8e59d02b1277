"""Files of ``torch.save``: where their tensors lie, without PyTorch.

Two containers hold the same pickle: a zip archive, whose entries are the
storages, and before PyTorch 1.6 a stream of five pickles with the storages
behind them. Both are mapped; :mod:`pickle_reader` reads the pickles.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import open_plain
from . import zip_entries
from .entries import Entry
from .pickle_reader import PickleRefusedError, Reader, Tensor
from .stored import map_file, unreadable

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class TorchFile:
    """What a file holds.

    Attributes
    ----------
    value : object
        What was saved: dicts, lists, numbers, text, and records of tensors.
    places : dict of str to (int, int)
        Offset and bytes of each storage.
    """

    path: Path
    value: Any
    places: Mapping[str, tuple[int, int]]

    def entries(self, tensors: Mapping[Any, Any]) -> dict[str, Entry]:
        """Those items of a dict that are tensors, by their keys."""
        found = {}
        for key, tensor in tensors.items():
            if not isinstance(key, str) or not isinstance(tensor, Tensor):
                continue
            storage = tensor.storage
            offset = self.places[storage.key][0] + tensor.offset * storage.dtype.itemsize
            found[key] = Entry(
                key, self.path, offset, storage.dtype.name, tensor.shape, tensor.strides
            )
        return found


def read(path: Path) -> TorchFile:
    """Read either container; storages are found and measured, and not touched.

    Raises
    ------
    CheckpointError
        If the file is damaged, or holds anything but tensors, numbers, text,
        lists and dicts.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            zipped = file.read(4) == b"PK\3\4"
            places = zip_entries.entries(file, size) if zipped else {}
        data = map_file(path).data
        return _from_zip(path, data, places) if zipped else _from_stream(path, data)
    except OSError as error:
        raise unreadable(path, error) from error
    except (PickleRefusedError, zip_entries.ZipRefusedError) as error:
        raise CheckpointError(
            f"not a file of tensors as torch.save writes it: {error}",
            where=str(path),
            remedy="Download or copy it again if it may be damaged. If it is whole and you trust "
            "it, load it in PyTorch and save its state dict as safetensors.",
        ) from error


def _from_zip(path: Path, data: memoryview, files: dict[str, tuple[int, int]]) -> TorchFile:
    names = [name for name in files if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) != 1:
        raise zip_entries.ZipRefusedError("the archive has no data.pkl")
    folder = names[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in files:
        raise zip_entries.ZipRefusedError("it is a program of TorchScript")
    if f"{folder}byteorder" in files:
        offset, size = files[f"{folder}byteorder"]
        _same_byteorder(bytes(data[offset : offset + min(size, 16)]) == b"little")
    offset, size = files[names[0]]
    reader = Reader(data[offset : offset + size])
    value = reader.read()
    places = {}
    for key, storage in reader.storages.items():
        place = files.get(f"{folder}data/{key}")
        if place is None or place[1] != storage.count * storage.dtype.itemsize:
            raise PickleRefusedError(f"storage {key[:40]!r} is missing or of another size")
        places[key] = place
    return TorchFile(path, value, places)


def _from_stream(path: Path, data: memoryview) -> TorchFile:
    place = 0
    values, readers = [], []
    for _ in range(5):
        reader = Reader(data[place:])
        values.append(reader.read())
        readers.append(reader)
        place += reader.place
        if values[0] != _LEGACY_MAGIC:
            raise PickleRefusedError("it does not begin as torch.save does")
    _, version, system, value, keys = values
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise PickleRefusedError("it does not begin as torch.save does")
    _same_byteorder(system.get("little_endian", True) is True)
    storages = readers[3].storages
    if not isinstance(keys, list) or len(keys) != len(storages):
        raise PickleRefusedError("its list of storages does not fit")
    places = {}
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or key in places:
            raise PickleRefusedError("its list of storages does not fit")
        count = int.from_bytes(data[place : place + 8], "little")
        place += 8
        size = storage.count * storage.dtype.itemsize
        if count != storage.count or place + size > len(data):
            raise PickleRefusedError(f"storage {key[:40]!r} is cut off or of another size")
        places[key] = place, size
        place += size
    if place != len(data):
        raise PickleRefusedError("bytes are left over at its end")
    return TorchFile(path, value, places)


def _same_byteorder(little: bool) -> None:
    if not little or sys.byteorder != "little":
        raise PickleRefusedError("its numbers are in big-endian order")
