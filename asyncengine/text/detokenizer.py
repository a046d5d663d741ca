"""Token ids to text, piece by piece."""

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from .tokenizer import Tokenizer

__all__ = ["ByteDetokenizer", "Detokenizer", "WindowDetokenizer", "make_detokenizer"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_TOKENS = 32
CONTEXT_TOKENS = 6


class Detokenizer(Protocol):
    """Turns one completion's ids into text. Joining all pieces gives the text of all ids at once.

    No piece ends inside a character: an incomplete one is held back until its last byte comes.
    """

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; possibly empty."""
        ...

    def finish(self) -> str:
        """What was held back, with U+FFFD for what never became a character."""
        ...


def make_detokenizer(
    tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
) -> Detokenizer:
    """A detokenizer for what follows `prompt_ids`.

    The prompt matters for tokenizers of the SentencePiece family, which drop the space before the
    very first word of a text, but not before the first word of a continuation.
    """
    table = tokenizer.token_bytes(skip_special_tokens=skip_special_tokens)
    if table is None:
        return WindowDetokenizer(tokenizer, prompt_ids, skip_special_tokens)
    strip = tokenizer.strips_first_space and not any(table[i] for i in prompt_ids if 0 <= i < len(table))
    return ByteDetokenizer(table, strip)


class ByteDetokenizer:
    """For vocabularies in which every token is a fixed string of bytes; `table[id]` has them.

    Invalid bytes become U+FFFD as `bytes.decode(errors="replace")` has it, one for each maximal part
    of a character. `strip` drops one space from the beginning of the text.
    """

    __slots__ = ("_pending", "_strip", "_table")

    def __init__(self, table: Sequence[bytes], strip: bool = False) -> None:
        self._table = table
        self._pending = b""
        self._strip = strip

    def push(self, ids: Sequence[int]) -> str:
        table = self._table
        try:
            data = table[ids[0]] if len(ids) == 1 else b"".join([table[i] for i in ids])
        except IndexError:
            # Models pad their vocabulary: ids beyond the tokenizer's are no text.
            data = b"".join([table[i] for i in ids if i < len(table)])
        if self._pending:
            data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class WindowDetokenizer:
    """For any decoder: decodes a short window of the newest ids again, and gives what is new in it.

    The window reaches back to a few ids before the last point at which all text was given; at first, into
    the prompt. Text in U+FFFD at the end is held back, since it may still become a character, but over no
    more than 32 tokens (a character takes at most four, yet tokens can end one and begin the next).
    """

    __slots__ = ("_given", "_ids", "_known", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._known = len(self._ids)
        """How many of the ids are wholly given."""
        self._given = 0
        """Characters given of the text after those."""

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push(i) for i in ids])

    def _push(self, token: int) -> str:
        self._ids.append(token)
        text = self._new_text()
        held = len(self._ids) - self._known
        stable = text.rstrip(REPLACEMENT) if held < MAX_HELD_TOKENS else text
        piece = stable[self._given :]
        if stable == text and (text or held >= MAX_HELD_TOKENS):
            self._advance()
        else:
            self._given = max(self._given, len(stable))
        return piece

    def finish(self) -> str:
        piece = self._new_text()[self._given :]
        self._advance()
        return piece

    def _new_text(self) -> str:
        before = self._decode(self._ids[: self._known])
        return self._decode(self._ids)[len(before) :]

    def _advance(self) -> None:
        del self._ids[: max(0, min(self._known, len(self._ids) - CONTEXT_TOKENS))]
        self._known, self._given = len(self._ids), 0

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
