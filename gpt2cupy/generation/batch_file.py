"""Files of a batch in OpenAI's format: requests in, answers out, one JSON object a line.

The output is only ever appended to, in whole lines; each names the number of its request. So a
batch that was killed goes on where it was: a torn last line is dropped, and requests that have an
answer are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from array import array
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..errors import InputError, shown
from ..files import open_plain
from ..output import file_errors, with_nulls

_ID = "batch_req_"
_SYNC_SECONDS = 1.0  # how much work a loss of power may cost


class InputLine(NamedTuple):
    """A request as it stands in the file."""

    number: int  # among the requests, from 0
    place: int  # among all lines of the file, from 1, as an editor counts them
    text: bytes


def parsed(line: bytes, place: int | None = None) -> Any:
    """A line as JSON.

    Raises
    ------
    InputError
        If it is none; it names the line by its place in the file.
    """
    try:
        return json.loads(line.decode("utf-8"))  # of bytes it would guess the encoding
    except (ValueError, RecursionError) as error:
        why = str(error)
        if isinstance(error, json.JSONDecodeError):  # whose own line number is always 1
            why = f"{error.msg} at column {error.colno}"
        elif isinstance(error, UnicodeDecodeError):
            why = f"byte {error.start} is not UTF-8"
        raise InputError(
            f"the line is no JSON: {why}"[:200],
            where="line" if place is None else f"line {place}",
            remedy="Write one object a line, without line breaks in it.",
        ) from error


def custom_id_of(found: Any) -> str | None:
    """What a request calls itself; None where it has no name."""
    name = found.get("custom_id") if isinstance(found, dict) else None
    return name if isinstance(name, str) and name else None


def path_of(given: Any, argument: str) -> Path:
    """The path that was passed as an argument."""
    with contextlib.suppress(TypeError, UnicodeEncodeError):
        if b"\0" not in os.fsencode(given):
            return Path(os.fsdecode(given))
    raise InputError(
        f"{argument}={shown(given)} is no path",
        where=argument,
        remedy="Pass a string or a pathlib.Path.",
    )


def _digest(custom_id: str | None) -> int:
    """64 bits of a name; 0 for none."""
    if custom_id is None:
        return 0
    data = custom_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class BatchInput:
    """A file of requests, read once to count them and to know their names.

    Memory holds eight bytes a line.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    digests : array of 64-bit integers
        Of the ``custom_id`` of each request; empty lines are none.

    Raises
    ------
    InputError
        If the file cannot be read, or two requests have one ``custom_id``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digests = array("Q")
        for line in self.lines():
            custom_id = None
            with contextlib.suppress(InputError):  # it gets its error with its answer
                custom_id = custom_id_of(parsed(line.text))
            self.digests.append(_digest(custom_id))
        self._check_names()

    def __len__(self) -> int:
        return len(self.digests)

    def lines(self) -> Generator[InputLine, None, None]:
        """Each request; empty lines are none."""
        number = 0
        with _read_errors(self.path), open_plain(self.path) as file:
            for place, line in enumerate(file, 1):
                if place == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield InputLine(number, place, line)
                    number += 1

    def _check_names(self) -> None:
        values = np.frombuffer(self.digests, np.uint64) if self.digests else np.zeros(0, np.uint64)
        order = np.sort(values)
        twice = set(order[1:][(order[1:] == order[:-1]) & (order[1:] != 0)].tolist())
        if not twice:
            return
        seen: dict[str, int] = {}
        for line in self.lines():
            if self.digests[line.number] in twice:
                name = custom_id_of(parsed(line.text)) or ""
                if name in seen:
                    raise InputError(
                        f"lines {seen[name]} and {line.place} both have the custom_id "
                        f"{shown(name)}",
                        where=str(self.path),
                        remedy="Give each request a custom_id of its own.",
                    )
                seen[name] = line.place


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror or error}",
            where=str(path),
            remedy="Name a file of requests that you may read; it is read twice, so no pipe.",
        ) from error


class BatchOutput:
    """The file of answers; used in a ``with`` statement, by one process at a time.

    Parameters
    ----------
    path : Path
    requests : BatchInput
    model : str
        Name of the model that answers.

    Attributes
    ----------
    done : bytearray
        1 for each request that has an answer.
    failed : int
        Answers so far that are errors.

    Raises
    ------
    InputError
        If the file holds something else than answers of this model to these requests, or
        another process is writing it.
    Gpt2CupyError
        If it cannot be written.
    """

    def __init__(self, path: Path, requests: BatchInput, model: str) -> None:
        self.path = path
        self.requests = requests
        self.model = model
        self.done = bytearray(len(requests))
        self.failed = 0
        with file_errors(path, "the answers"):
            there = path.exists()
            if there and requests.path.exists() and os.path.samefile(path, requests.path):
                raise InputError(
                    "requests and answers are one file",
                    where=str(path),
                    remedy="Name another file for the answers.",
                )
            if there and not path.is_file():  # what is read back to be gone on with
                raise InputError(
                    "the answers are to go to what is no plain file",
                    where=str(path),
                    remedy="Name a file; a pipe or a device cannot be gone on with.",
                )
            self._file: IO[bytes] = path.open("a+b")
        self._synced = time.monotonic()
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, *exception: object) -> None:
        with file_errors(self.path, "the answers"), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                "another process is writing the answers",
                where=str(self.path),
                remedy="Wait for it, or name another file.",
            ) from error

    def _read(self) -> None:
        """Note what is answered, and drop the end of a line that was not written whole."""
        whole = 0
        self._file.seek(0)
        for line in self._file:
            # A loss of power may leave zeros where a line was not yet on the disk.
            if not line.endswith(b"\n") or b"\0" in line:
                break
            whole += len(line)
            if line.strip():
                self._note(line)
        with file_errors(self.path, "the answers"):
            self._file.truncate(whole)

    def _note(self, line: bytes) -> None:
        try:
            found = parsed(line)
            number = int(str(found["id"]).removeprefix(_ID))
            known = 0 <= number < len(self.done)
            ours = known and self.requests.digests[number] == _digest(custom_id_of(found))
            answer = found["response"]["body"] if found["error"] is None else {}
            model = answer.get("model", self.model)
        except (InputError, LookupError, TypeError, ValueError, AttributeError):
            ours, model = False, self.model
        if not ours or model != self.model:
            what = "of other requests" if not ours else f"of the model {shown(model)}"
            raise InputError(
                f"the file of answers holds some {what}",
                where=str(self.path),
                remedy="Name another file for the answers, or remove this one.",
            )
        self.done[number] = 1
        self.failed += found["error"] is not None

    def unanswered(self) -> Generator[InputLine, None, None]:
        """Each request without an answer; the file of requests is open until it is closed."""
        with contextlib.closing(self.requests.lines()) as lines:
            for line in lines:
                if line.number >= len(self.done):
                    raise InputError(
                        "the file of requests has grown",
                        where=str(self.requests.path),
                        remedy="Start again: what is answered is kept.",
                    )
                if not self.done[line.number]:
                    yield line

    def write(
        self,
        number: int,
        custom_id: str | None,
        status: int,
        body: dict[str, Any],
        error: dict[str, Any] | None = None,
    ) -> None:
        """Append the answer to a request.

        Parameters
        ----------
        number : int
        custom_id : str or None
        status : int
            As of HTTP.
        body : dict
        error : dict, optional
            ``code`` and ``message`` of a request that failed.
        """
        name = f"{_ID}{number}"
        answer = {"status_code": status, "request_id": name, "body": body}
        line = {"id": name, "custom_id": custom_id, "response": answer, "error": error}
        with file_errors(self.path, "the answers"):
            # One write: what a kill leaves of it is an unfinished last line at most.
            self._file.write(_dumped(line).encode() + b"\n")
            self._file.flush()
            if (now := time.monotonic()) - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = now
        self.done[number] = 1
        self.failed += error is not None


def _dumped(line: dict[str, Any]) -> str:
    """JSON, where a number that it has not (the logarithm of a probability of 0) is null."""
    try:
        return json.dumps(line, allow_nan=False)
    except ValueError:
        return json.dumps(with_nulls(line), allow_nan=False)
