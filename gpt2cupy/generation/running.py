"""What an engine runs: cache slots, prompt pieces, the rows of a step, and tokens that come back.

The parts of one :meth:`gpt2cupy.generation.engine.Engine.step`, in the order in which it calls
them. Nothing here knows of threads.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from ..decode import PromptRunner
from ..model import GPT2
from .draft_rows import DraftRows
from .prefixes import Prefixes
from .results import Block, Results, merged
from .rows import Queued, Rows
from .scheduler import Piece, Scheduler, Sequence

_NOTHING = np.zeros(0, np.int32)
PREFILL_ROWS = 1024  # prompt tokens run between two decode steps


class Running:
    """Sequences that run together.

    Parameters
    ----------
    model : GPT2
    slots : int
    capacity : int or None
        As of :class:`gpt2cupy.generation.engine.Engine`.
    path : str
        Decode path, or "auto".

    Attributes
    ----------
    cache : KVCache
    plain : Rows
        What runs the steps of texts that do not speculate.
    rows : Rows or DraftRows
        What runs the steps now.
    prompts : PromptRunner
    scheduler : Scheduler
    results : Results
    discarded : int
        Tokens that were computed past the end of their text.
    drafted, accepted : int
        Draft tokens that were verified, of all texts, and of them those that were accepted.
    """

    def __init__(self, model: GPT2, slots: int, capacity: int | None, path: str) -> None:
        self.model = model
        self.cache = model.new_cache(slots, capacity)
        self.plain = Rows(model, self.cache, path)
        self._drafting: DraftRows | None = None  # made when a text speculates
        self.rows: Rows | DraftRows = self.plain
        rows = min(PREFILL_ROWS, slots * self.cache.capacity)
        self.prefill_work = model.new_workspace(rows)
        graphs = path != "eager"
        self.prompts = PromptRunner(model, self.cache, self.prefill_work, graphs=graphs)
        self.scheduler = Scheduler(slots, rows)
        self.results = Results(self.cache.capacity + 1)
        self.discarded = self.drafted = self.accepted = 0
        self._started = False  # whether it ever ran a prompt
        self._queued: deque[Queued] = deque()
        self._closing: deque[tuple[int, Sequence]] = deque()  # lines to close after a step
        self._held_back: list[Sequence] = []  # whose bias keeps ends back until min_new_tokens
        self._processed: list[Sequence] = []  # those with rows whose logits are changed by Python

    @property
    def prefixes(self) -> Prefixes:
        """What the slots hold."""
        return self.scheduler.prefixes

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or is still to be read."""
        return self.scheduler.idle and not self._queued

    def lead(self, most: int) -> int:
        """Steps that may be queued before the oldest is read, of at most so many.

        None where a row's next step needs the text so far.
        """
        return 0 if self._processed else min(most, self.rows.most_lead)

    @property
    def unread(self) -> bool:
        """Whether tokens are on their way."""
        return bool(self._queued)

    def clear(self) -> None:
        """Leave no sequence behind."""
        self._queued.clear()
        self.scheduler.clear()
        self.cache.reset()
        self._closing.clear()
        self._held_back.clear()
        self._processed.clear()
        self.results.clear()
        self.rows.release(0, self.rows.state.batch)

    def recover(self) -> None:
        """After an error in mid-step, and :meth:`clear`."""
        self.plain.recover()
        if self._drafting is not None:
            self._drafting.recover()

    # -- sequences come and go ---------------------------------------------------------------------

    def admit(self) -> None:
        """Give slots to sequences that wait."""
        for sequence in self.scheduler.admit():
            self.cache.lengths[sequence.slot] = sequence.run
            sequence.number = self.results.open(sequence.request, sequence.limit)

    def cancel(self, sequences: list[Sequence]) -> None:
        """Let go of sequences whose callers want no more tokens."""
        for sequence in sequences:
            if sequence.number >= 0:
                self.results.alive[sequence.number] = False
        self._end(sequences)
        for sequence in sequences:
            if sequence.number >= 0:
                count = int(self.results.counts[sequence.number])
                self._keep(sequence, self.results.ids[sequence.number, :count])

    def finish(self, sequences: list[Sequence], block: Block) -> None:
        """Let go of the sequences that have come to their ends in a block."""
        self._end(sequences)
        for sequence, done in zip(sequences, block.finished, strict=True):
            if done.finish_reason != "error":
                self._keep(sequence, done.ids)
        self._close_lines()

    def _end(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.ended = True
            if sequence.number >= 0:
                self._closing.append((len(self._queued) and self._queued[-1].step, sequence))
        self._leave([sequence for sequence in sequences if sequence.slot >= 0])

    def _keep(self, sequence: Sequence, ids: np.ndarray) -> None:
        """Let later prompts begin with what a sequence that has left its slot generated.

        Not where bits may not depend on it: steps write other last bits than prompts. The last
        token may not have been fed.
        """
        if not self.model.batch_invariant:
            self.prefixes.extend(sequence.home, sequence, ids[:-1])

    def _leave(self, sequences: list[Sequence]) -> None:
        """Take rows and slots from sequences."""
        before = len(self.scheduler.rows)
        # From the last row on: of neighbours that leave together none has to move.
        for sequence in sorted(sequences, key=lambda each: -each.row):
            if sequence.slot >= 0:
                self.cache.reset(sequence.slot)
            if sequence in self._processed:
                self._processed.remove(sequence)
            if (move := self.scheduler.leave(sequence)) is not None:
                self.rows.state.move(*move)
        if (after := len(self.scheduler.rows)) < before:
            self.rows.release(after, before)

    # -- what is queued ----------------------------------------------------------------------------

    def run_prompts(self) -> None:
        """Run a piece of waiting prompts; give rows to those that end, with their first tokens."""
        piece = self.scheduler.piece()
        if not piece.sequences:
            return
        if piece.copies:
            self.prompts.copy(piece.copies)
        # All but the last, which may be cut.
        done = [sequence for sequence in piece.sequences if not len(sequence.rest)]
        slots = [sequence.slot for sequence in piece.sequences]
        if done:
            self.scheduler.enter(done)
            self.rows = self._rows_of(done[0])
            self.rows.enter(done)
        # One sequence in an engine for one, to its end: the same graph samples its first token.
        alone = self.cache.slots == 1 and bool(done)
        state = self.rows.state if alone else None
        if not self._started:
            self._start(piece, len(done), alone)
        x = self.prompts.run(piece.tokens, slots, state)
        if not done:
            return
        rows = slice(done[0].row, done[-1].row + 1)
        if not alone:
            self.plain.sample_first(x[: len(done)], rows.start)
        processed = [each for each in done if each.request.params.logits_processor is not None]
        for sequence in processed:
            self.plain.process(sequence, _NOTHING)
        self._processed += processed
        self._ask(rows)
        waits = [each for each in done if each.row >= 0 and len(each.request.held_back) > 1]
        self._held_back += waits

    def _rows_of(self, sequence: Sequence) -> Rows | DraftRows:
        """What runs the steps of a sequence; only one that is alone may speculate."""
        if sequence.request.params.speculate is None:
            return self.plain
        if self._drafting is None:
            self._drafting = DraftRows(self.plain)
        return self._drafting

    def _start(self, piece: Piece, done: int, alone: bool) -> None:
        """Record all that the first tokens need, so that its kernels are compiled side by side."""
        state = self.rows.state if alone else None
        self.prompts.record([len(tokens) for tokens in piece.tokens], state)
        self.rows.record(max(done, 1), first=not alone)
        self._started = True

    def queue_step(self) -> bool:
        """Queue a decode step of all rows, if there are any."""
        running = len(self.scheduler.rows)
        if not running:
            return False
        if self._held_back:
            self._free_ends()
        self.rows.step(running)
        for sequence in self._processed:
            count = self.results.counts[sequence.number]
            self.plain.process(sequence, self.results.ids[sequence.number, :count])
        self.cache.lengths[self.scheduler.lines[1]] += 1
        self._ask(slice(0, running))
        return True

    def _free_ends(self) -> None:
        """Let those ends be chosen that a bias has kept back long enough."""
        for sequence in list(self._held_back):
            params, number = sequence.request.params, sequence.number
            if sequence.row >= 0 and self.results.queued[number] < params.min_new_tokens:
                continue
            self._held_back.remove(sequence)
            if sequence.row >= 0:
                self.rows.set_bias(sequence.row, params.logit_bias)

    def _ask(self, rows: slice) -> None:
        """Note the tokens that rows were just asked for; who has asked for its last one leaves."""
        numbers = self.scheduler.lines[0][rows]
        top = int(self.results.tops[numbers].max())
        self._queued.append(self.rows.asked(rows, numbers, top))
        last = self.results.ask(numbers) + rows.start
        if len(last):
            running = self.scheduler.rows
            self._leave([running[row] for row in last.tolist()])

    # -- what comes back ---------------------------------------------------------------------------

    def collect(self, lead: int | None) -> list[Block]:
        """Read what is due: of steps that are ``lead`` old; the oldest one without a lead.

        One block, or those with a token each that a step brought for a text that speculates.
        Their sequences that have ended have to be given to :meth:`finish`.
        """
        blocks: list[Block] = []
        while self._queued:
            due = not blocks if lead is None else self._queued[0].step + lead <= self.rows.steps
            if not due:
                break
            queued = self._queued.popleft()
            if queued.drafts >= 0:
                # Read alone: a step before it is of the same text.
                return (
                    [merged(blocks), *self._read_drafts(queued)]
                    if blocks
                    else self._read_drafts(queued)
                )
            blocks.append(self._read(queued))
        return [merged(blocks)]

    def _read(self, queued: Queued) -> Block:
        ids, logprobs, top = queued.source.read(queued)
        self.discarded += len(ids) - int(self.results.alive[queued.numbers].sum())
        return self.results.add(queued.numbers, ids, logprobs, top)

    def _read_drafts(self, queued: Queued) -> list[Block]:
        """The tokens that a step brought for one text, a block for each."""
        ids, logprobs, top = queued.source.read(queued)
        results, numbers = self.results, queued.numbers[:1]
        number = int(numbers[0])
        if results.alive[number]:
            results.drafted[number] += queued.drafts
            results.accepted[number] += len(ids) - 1
            self.drafted += queued.drafts
            self.accepted += len(ids) - 1
        blocks = []
        for place in range(len(ids)):
            if not results.alive[number]:
                self.discarded += len(ids) - place
                break
            one = slice(place, place + 1)
            best = None if top is None else (top[0][one], top[1][one])
            blocks.append(results.add(numbers, ids[one], logprobs[one], best))
        # Each step was counted as one token when it was asked for.
        results.queued[number] += len(ids) - 1
        if results.queued[number] >= results.limits[number]:
            self._leave([each for each in self.scheduler.rows if each.number == number])
        return blocks or [merged([])]

    def _close_lines(self) -> None:
        """Close lines that no queued step names any more."""
        while self._closing and not (self._queued and self._queued[0].step <= self._closing[0][0]):
            self.results.close(self._closing.popleft()[1].number)
