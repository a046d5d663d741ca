"""Byte-pair encoding in two steps, so that making a large model locks nobody out.

The constructor of `tokenizers.models.BPE` keeps Python's global lock from beginning to end: for a
vocabulary of 150,000 a quarter of a second, in which the caller's event loop stands still whatever thread
does the work. So only the first merges, by far the most used, go there; the rest is done here.

This changes no result. Merging takes the best merge of a word first, over and over. While one of the first
merges applies, the others have no say, so the first step does what the whole would have done; after that
every merge has its say here.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any, NamedTuple

from tokenizers import AddedToken, models

from ..errors import ModelLoadError

__all__ = ["LateMerges", "SplitModel", "split_bpe"]

FIRST_MERGES = 10_000
"""What goes into the first step: some 10 ms of construction."""

CACHED_WORDS = 20_000
CACHED_LENGTH = 32
PAIR = 32
"""Bits of an id: a pair of ids, and a rank with an id, are packed into one integer."""


class LateMerges:
    """The second step: merges within the words that the first step has left in several tokens."""

    def __init__(
        self, table: dict[int, int], whole_words: dict[str, int] | None, tokens: Sequence[str | None]
    ) -> None:
        self._table = table
        """(left id, right id) → (rank, id of both together)."""
        self._whole_words = whole_words
        self._tokens = tokens
        self._cache: dict[tuple[int, ...], list[int]] = {}

    def apply(self, ids: list[int], words: Sequence[int | None]) -> list[int]:
        """Merges neighbours of the same word. `words` has a number per id; None is of no word."""
        merged: list[int] = []
        start, count = 0, len(ids)
        while start < count:
            word = words[start]
            end = start + 1
            while end < count and words[end] == word and word is not None:
                end += 1
            if end - start == 1:
                merged.append(ids[start])
            else:
                merged += self._word(tuple(ids[start:end]))
            start = end
        return merged

    def _word(self, ids: tuple[int, ...]) -> list[int]:
        known = self._cache.get(ids)
        if known is not None:
            return known
        whole = None
        if self._whole_words is not None:
            whole = self._whole_words.get("".join([self._tokens[i] or "" for i in ids]))
        merged = self._merge(list(ids)) if whole is None else [whole]
        if len(ids) <= CACHED_LENGTH:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            self._cache[ids] = merged
        return merged

    def _merge(self, ids: list[int]) -> list[int]:
        """The best merge first, of several the leftmost, until there is none."""
        table = self._table
        heap = [
            (merge, at)
            for at, (left, right) in enumerate(pairwise(ids))
            if (merge := table.get(left << PAIR | right)) is not None
        ]
        if not heap:
            return ids
        heapify(heap)
        last = len(ids)
        before, after = list(range(-1, last - 1)), list(range(1, last + 1))
        while heap:
            merge, at = heappop(heap)
            right = after[at]
            # An entry is stale once one of its two has been merged with another neighbour.
            if right >= last or ids[at] < 0 or table.get(ids[at] << PAIR | ids[right]) != merge:
                continue
            ids[at], ids[right] = merge & (1 << PAIR) - 1, -1
            after[at] = after[right]
            if after[at] < last:
                before[after[at]] = at
            for left in (before[at], at):
                if left >= 0 and after[left] < last:
                    new = table.get(ids[left] << PAIR | ids[after[left]])
                    if new is not None:
                        heappush(heap, (new, left))
        return [i for i in ids if i >= 0]


class SplitModel(NamedTuple):
    """A BPE model for `tokenizers`, the merges it leaves, and all tokens by their ids."""

    model: models.BPE
    late: LateMerges | None
    tokens: list[str | None]


def split_bpe(
    vocab: dict[str, int], merges: Sequence[tuple[str, str]], added: Sequence[AddedToken], **options: Any
) -> SplitModel:
    """Splits a model of `vocab` (token → id) and `merges`, best first.

    `added` are the tokens that will be added to it, in order; those that are not in the vocabulary get the
    ids that follow it, as in `tokenizers`. `options` are those of `models.BPE`. Raises `ModelLoadError` if a
    merge has or makes a token that is not in the vocabulary.
    """
    given, vocab = vocab, dict(vocab)
    if not vocab:
        raise ModelLoadError("the tokenizer's vocabulary is empty")
    fixed = {token.content for token in added} | {options.get("unk_token")}
    next_id = len(vocab)
    for token in added:
        if token.content not in vocab:
            vocab[token.content] = next_id
        next_id = max(next_id, vocab[token.content] + 1)
    lowest, highest = min(vocab.values()), max(vocab.values())
    if lowest < 0 or highest > 4 * len(vocab) + 1024:
        raise ModelLoadError(
            f"the tokenizer has {len(vocab)} tokens, but their ids reach from {lowest} to {highest}"
        )
    tokens: list[str | None] = [None] * (highest + 1)
    for text, i in vocab.items():
        tokens[i] = text

    whole = any(options.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    first = merges if whole else merges[:FIRST_MERGES]
    late = merges[len(first) :]
    try:
        if not late:
            return SplitModel(models.BPE(given, first, **options), None, tokens)
        table, only_late = _late_table(vocab, first, late)
        only_late -= fixed
        model = models.BPE({text: i for text, i in vocab.items() if text not in only_late}, first, **options)
    except Exception as error:  # tokenizers raises plain Exception for everything
        raise ModelLoadError(f"the tokenizer's vocabulary and merges do not fit together: {error}") from error
    whole_words = vocab if options.get("ignore_merges") else None
    return SplitModel(model, LateMerges(table, whole_words, tokens), tokens)


def _late_table(
    vocab: dict[str, int], first: Sequence[tuple[str, str]], late: Sequence[tuple[str, str]]
) -> tuple[dict[int, int], set[str | None]]:
    """The table of the second step, and the tokens that the first step has no use for."""
    table: dict[int, int] = {}
    made: set[str] = set()

    def enter(rank: int, left: str, right: str) -> None:
        both = left + right
        table[vocab[left] << PAIR | vocab[right]] = rank << PAIR | vocab[both]
        made.add(both)

    for rank, (left, right) in enumerate(late, len(first)):
        enter(rank, left, right)
    only_late: set[str | None] = {*made}
    for left, right in first:
        only_late.difference_update((left, right, left + right))
    # Merges of the first step that what is made in the second step makes possible again.
    unmade = list(enumerate(first))
    while True:
        again = [item for item in unmade if not made.isdisjoint(item[1])]
        if not again:
            return table, only_late
        unmade = [item for item in unmade if made.isdisjoint(item[1])]
        for rank, (left, right) in again:
            enter(rank, left, right)
