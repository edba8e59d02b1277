"""What a tokenizer is made of, whatever files it came from, and which tokens merging can make."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"


def _byte_symbols() -> dict[str, int]:
    """GPT-2 writes bytes as printable characters: the character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return symbols | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_SYMBOLS = _byte_symbols()


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes
    ----------
    merged : list of int
        Ids that encoding can make, in the order in which merges apply: bytes first.
    texts : dict of int to bytes
        Bytes of every id, the added tokens too.
    added : dict of str to int
        Tokens that are matched as a whole and only where allowed.
    always : set of str
        Those of ``added`` that are ordinary text to their users and matched everywhere.
    end : str
        The end-of-text token's name.
    """

    merged: list[int]
    texts: dict[int, bytes]
    added: dict[str, int] = field(default_factory=dict)
    always: frozenset[str] = frozenset()
    end: str = END_OF_TEXT


def reachable(alphabet: list[int], rules: list[tuple[int, int, int]], where: str) -> list[int]:
    """Tokens that merging can make, by the rank of the rule that makes them.

    tiktoken knows tokens and ranks, not pairs: it joins any two neighbours whose
    bytes together are a token. That is the same as applying the rules exactly if
    every token it knows is what the rules make of that token's own bytes: then
    only the token's own pair can ever stand side by side. Trained vocabularies
    are like that except for a few tokens, which no text can produce; they are
    left out here.
    """
    ranks = {(left, right): rank for rank, (left, right, _) in enumerate(rules)}
    born = dict.fromkeys(alphabet, -1)
    parts: dict[int, tuple[int, int]] = {}

    def meet(left: int, right: int, rank: int) -> bool:
        """Whether merging left + right arrives at these two: no rule joins across their seam.

        Goes back in time from the finished pair, undoing whichever side was made
        last, and looks at the two tokens at the seam; ``*_end`` is when each goes.
        """
        left_end = right_end = rank
        while True:
            if born[left] > born[right]:
                left_end, left = born[left], parts[left][1]
            elif born[right] >= 0:
                right_end, right = born[right], parts[right][0]
            else:
                return True
            across = ranks.get((left, right), rank)
            # At equal ranks the leftmost pair is merged first.
            if across < left_end and across <= right_end:
                return False

    skipped = []
    for rank, (left, right, token) in enumerate(rules):
        if left not in born or right not in born:
            skipped.append((left, right))
        elif token not in born and ranks[left, right] == rank and meet(left, right, rank):
            born[token], parts[token] = rank, (left, right)
    if any(left in born and right in born for left, right in skipped):
        raise TokenizerError(
            "a merge uses a token that only a later merge makes",
            where=where,
            remedy="Merges must stand in the order in which they were learnt.",
        )
    return list(parts)


def token_texts(vocab: dict[str, int]) -> dict[int, bytes]:
    """Bytes of each id; a token with other characters than byte symbols stands for itself."""
    # One translation of all tokens is several times faster than one each.
    joined = "\n".join(vocab)
    if set(joined) <= BYTE_SYMBOLS.keys() | {"\n"} and joined.count("\n") == len(vocab) - 1:
        table = {ord(symbol): byte for symbol, byte in BYTE_SYMBOLS.items()} | {10: 256}
        tokens = joined.translate(table).split(chr(256))
        return {
            id_: text.encode("latin-1") for id_, text in zip(vocab.values(), tokens, strict=True)
        }
    return {
        id_: bytes(BYTE_SYMBOLS[c] for c in token)
        if all(c in BYTE_SYMBOLS for c in token)
        else token.encode("utf-8", "replace")
        for token, id_ in vocab.items()
    }
