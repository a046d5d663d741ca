"""Token ids to text, piece by piece."""

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from .tokenizer import Tokenizer

__all__ = ["ByteDetokenizer", "Detokenizer", "WindowDetokenizer", "make_detokenizer"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_CHARACTER_TOKENS = 4
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

    The window reaches from the ids of the piece before last; before the first piece, from the end of the
    prompt. Text that ends in U+FFFD is held back for as long as it may still become a character.
    """

    __slots__ = ("_ids", "_read", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._read = len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push(i) for i in ids])

    def _push(self, token: int) -> str:
        self._ids.append(token)
        text = self._new_text()
        waits = text.endswith(REPLACEMENT) and len(self._ids) - self._read < MAX_CHARACTER_TOKENS
        if not text or waits:
            # Tokens without text (skipped ones) must not make the window grow.
            if len(self._ids) - self._read > 4 * CONTEXT_TOKENS:
                self._advance()
            return ""
        self._advance()
        return text

    def finish(self) -> str:
        text = self._new_text()
        self._advance()
        return text

    def _new_text(self) -> str:
        known = self._decode(self._ids[: self._read])
        return self._decode(self._ids)[len(known) :]

    def _advance(self) -> None:
        del self._ids[: max(0, min(self._read, len(self._ids) - CONTEXT_TOKENS))]
        self._read = len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
