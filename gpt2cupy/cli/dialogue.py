"""``gpt2cupy generate`` on a terminal without a prompt: user and model write in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import Gpt2CupyError, InputError, shown
from ..sampling import SamplingParams
from . import shell

if TYPE_CHECKING:
    from ..lm import LanguageModel

HELP = """\
Type some text and press Enter: the model continues it, and what you type next goes on from there.
  /new             begin a new text
  /text            show the text so far
  /undo            take back the last thing typed and what the model made of it
  /set NAME VALUE  change a setting, as in: /set temperature 0.8
  /settings        show the settings
  /help            show this
  /quit            end, as Ctrl-D does
Ctrl-C ends what the model is writing. A text that begins with / is typed with //.
"""
_PROMPT = "> "


class Dialogue:
    """A text that grows in turns.

    Parameters
    ----------
    lm : LanguageModel
    settings : dict
        Fields of SamplingParams.
    special : bool
        Whether special tokens in what is typed stand for themselves.
    """

    def __init__(self, lm: LanguageModel, settings: dict[str, Any], *, special: bool) -> None:
        self.lm = lm
        self.settings = dict(settings)
        self.text = ""
        self._special = special
        self._before: list[str] = []  # the text before each turn
        self._commands: dict[str, Callable[[str], object]] = {
            "new": self._new,
            "text": lambda _: shell.write(f"{self.text}\n"),
            "undo": self._undo,
            "set": self._set,
            "settings": self._show_settings,
            "help": lambda _: shell.write(HELP),
        }

    def run(self) -> None:
        """Take turns until the user ends it."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lets input() edit lines and remember them)
        shell.say(shell.paint("Type a text to continue; /help says what else.", shell.DIM))
        while (line := self._typed()) is not None:
            try:
                if line.startswith("/") and not line.startswith("//"):
                    name, _, rest = line[1:].strip().partition(" ")
                    if name in ("quit", "exit", "q"):
                        return
                    self._command(name, rest.strip())
                else:
                    self._turn(line.removeprefix("/") if line.startswith("//") else line)
            except Gpt2CupyError as error:
                # What is at fault is a setting or the text: the next ones may be right.
                shell.say(f"{shell.paint('gpt2cupy:', shell.RED)} {error}")

    def _typed(self) -> str | None:
        """A line, or None at the end; Ctrl-C leaves what was typed of it."""
        while True:
            try:
                line = input(_PROMPT)
            except EOFError:
                shell.write("\n")
                return None
            except KeyboardInterrupt:
                shell.write("\n")
                continue
            return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def _command(self, name: str, rest: str) -> None:
        if name not in self._commands:
            raise InputError(
                f"there is no /{name}",
                where="the dialogue",
                remedy="Type /help for what there is, // for a text with /.",
            )
        self._commands[name](rest)

    def _new(self, _: str) -> None:
        self.text = ""
        self._before.clear()

    def _undo(self, _: str) -> None:
        if not self._before:
            raise InputError(
                "there is nothing to take back", where="the dialogue", remedy="Type a text."
            )
        self.text = self._before.pop()

    def _set(self, rest: str) -> None:
        name, _, given = rest.partition(" ")
        name = name.replace("-", "_")
        fields = {field.name for field in dataclasses.fields(SamplingParams)} - {"n", "logprobs"}
        if name not in fields or not given:
            raise InputError(
                f"/set {shown(rest)} is no setting with a value",
                where="the dialogue",
                remedy=f"Settings: {', '.join(sorted(fields))}.",
            )
        try:
            value = json.loads(given)
        except ValueError:
            value = given.strip()
        if name == "logit_bias" and isinstance(value, dict):
            value = {int(id_) if id_.isdecimal() else id_: each for id_, each in value.items()}
        wanted = self.settings | {name: value}
        SamplingParams(**wanted)
        self.settings = wanted

    def _show_settings(self, _: str) -> None:
        for field in dataclasses.fields(SamplingParams):
            if field.name not in ("n", "logprobs"):
                value = getattr(SamplingParams(**self.settings), field.name)
                shell.write(f"{field.name:<20} {value}\n")

    def _turn(self, typed: str) -> None:
        """Let the model go on from what was typed."""
        before, text = self.text, self.text + typed
        ids = self._ids(text)
        pieces = self.lm.stream(ids, **self.settings)
        self._before.append(before)
        self.text = text
        with contextlib.closing(pieces), _interrupted() as wanted:  # type: ignore[type-var]
            for piece in pieces:
                self.text += piece.text
                shell.write(piece.text)
                if wanted.is_set():
                    break
        shell.write("\n")

    def _ids(self, text: str) -> list[int]:
        """The end of a text that leaves room for what the model is to write."""
        lm = self.lm
        special = "all" if self._special else "none"
        ids = lm.tokenizer.encode(text, allowed_special=special) or [lm.bos_token_id]
        params = SamplingParams(**self.settings)
        context = lm.config.n_positions
        wanted = params.must_fit or min(params.limit(context), context // 2)
        room = max(context + 1 - wanted, 1)
        if len(ids) > room:
            left = len(ids) - room
            note = f"[the first {left} of {len(ids)} tokens are beyond the context]"
            shell.say(shell.paint(note, shell.DIM))
        return ids[-room:]


@contextlib.contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of ending a step half-way; a second one raises."""
    wanted = threading.Event()

    def note(number: int, frame: Any) -> None:
        if wanted.is_set():
            raise KeyboardInterrupt
        wanted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield wanted
    except KeyboardInterrupt:
        wanted.set()
    finally:
        signal.signal(signal.SIGINT, before)
