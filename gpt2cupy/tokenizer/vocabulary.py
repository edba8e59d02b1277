"""What a tokenizer is made of, whatever files it came from, and which tokens merging can make."""

from __future__ import annotations

from dataclasses import dataclass, field

END_OF_TEXT = "<|endoftext|>"
# What Unicode calls white space; Python's \s has four control characters more.
_SPACE_CODES = (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))
WHITE_SPACE = "".join(map(chr, (*_SPACE_CODES, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)))


def _byte_symbols() -> dict[str, int]:
    """GPT-2 writes bytes as printable characters: the character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return symbols | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_SYMBOLS = _byte_symbols()


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole.

    Attributes
    ----------
    text : str
    id : int
    special : bool
        Matched only where allowed; else it is ordinary text to its users.
    lstrip, rstrip : bool
        White space before or behind it is swallowed.
    single_word : bool
        Matched only where no letter stands beside it.
    normalized : bool
        Matched after those that are not.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes
    ----------
    merged : list of int
        Ids that encoding can make, in the order in which merges apply: bytes first.
    texts : dict of int to bytes
        Bytes of every id, the added tokens too.
    added : dict of str to AddedToken
    roles : dict of str to int
        Ids of bos_token, eos_token and so on.
    prefix_space : bool
        A space goes before a text that begins with none.
    rules : list of (int, int, int)
        Left, right and joined token of every merge, where their order is not that in
        which they were learnt: then ``merged`` does not say what encoding does.
    """

    merged: list[int]
    texts: dict[int, bytes]
    added: dict[str, AddedToken] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=dict)
    prefix_space: bool = False
    rules: list[tuple[int, int, int]] = field(default_factory=list)


def reachable(alphabet: list[int], rules: list[tuple[int, int, int]]) -> list[int] | None:
    """Tokens that merging can make, by the rank of the rule that makes them.

    None where a rule uses a token that only a later one makes.

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
        return None
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
