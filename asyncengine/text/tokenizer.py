"""Text to token ids and back."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import processors

from ..errors import InvalidRequestError

__all__ = ["INLINE_CHARACTERS", "Tokenizer"]

INLINE_CHARACTERS = 4096
"""Texts up to this length take at most a few milliseconds; tokenize longer ones in a thread."""

SPACE_MARK = "▁"
ChatTemplates = str | Mapping[str, str]


class Tokenizer:
    """A model's tokenizer with its special tokens and chat templates. Safe to use from any thread.

    `core` is what does the work. `special_tokens` maps roles (`bos_token`, `eos_token`, `unk_token`, ...)
    to tokens. `add_bos` and `add_eos` say whether `encode` adds these; None leaves it to `core`.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        chat_template: ChatTemplates | None = None,
    ) -> None:
        self.core = core
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        self.bos_token_id = self.token_to_id(self.bos_token)
        self.eos_token_id = self.token_to_id(self.eos_token)
        if add_bos is not None or add_eos is not None:
            self._frame(bool(add_bos), bool(add_eos))
        self.vocab_size: int = core.get_vocab_size(with_added_tokens=True)
        """How many tokens there are. A model's output may be wider: vocabularies are often padded."""
        self.special_ids = frozenset(i for i, t in core.get_added_tokens_decoder().items() if t.special)
        """Ids that `skip_special_tokens` leaves out."""
        to_bytes, self.strips_first_space = _byte_rule(core)
        self._tables = None if to_bytes is None else self._make_tables(to_bytes)

    def _frame(self, bos: bool, eos: bool) -> None:
        """Makes `encode` put `bos_token` before and `eos_token` behind a text."""
        before = [("BOS", self.bos_token_id, self.bos_token)] if bos and self.bos_token_id is not None else []
        after = [("EOS", self.eos_token_id, self.eos_token)] if eos and self.eos_token_id is not None else []
        names = [*(name for name, *_ in before), "$A", *(name for name, *_ in after)]
        self.core.post_processor = processors.TemplateProcessing(
            single=names,
            pair=[*names, *(f"{name.replace('$A', '$B')}:1" for name in names)],
            special_tokens=[{"id": name, "ids": [i], "tokens": [text]} for name, i, text in before + after],
        )

    def _make_tables(self, to_bytes: Callable[[str], bytes]) -> tuple[list[bytes], list[bytes]]:
        id_to_token = self.core.id_to_token
        highest = self.core.get_vocab_size(with_added_tokens=False)
        highest = max([highest, *(i + 1 for i in self.core.get_added_tokens_decoder())])
        table = [b"" if (token := id_to_token(i)) is None else to_bytes(token) for i in range(highest)]
        visible = list(table)
        for i in self.special_ids:
            visible[i] = b""
        return table, visible

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text become their ids.

        Long texts let other threads run meanwhile. Raises `InvalidRequestError` naming `prompt` where the
        text is not a string or has lone surrogates.
        """
        try:
            if len(text) <= INLINE_CHARACTERS:
                ids: list[int] = self.core.encode(text, add_special_tokens=add_special_tokens).ids
            else:
                # Only the batched calls let go of Python's global lock.
                ids = self.core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeError) as error:
            if not isinstance(text, str):
                rule = f"must be a string, not {type(text).__name__}"
            else:
                rule = f"cannot be written in UTF-8, it has lone surrogates: {error}"
            raise InvalidRequestError(f"the prompt {rule}", parameter="prompt", value=text) from error
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no character become U+FFFD. Unknown ids are left out."""
        try:
            text: str = self.core.decode(ids, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise InvalidRequestError(
                f"ids must be a sequence of token ids: {error}", parameter="ids", value=ids
            ) from error
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None."""
        try:
            token: str | None = self.core.id_to_token(token_id)
        except OverflowError:
            return None
        return token

    def token_to_id(self, token: str | None) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        token_id: int | None = None if token is None else self.core.token_to_id(token)
        return token_id

    def token_text(self, token_id: int) -> str | None:
        """One token as text, with its leading space; a part of a character shows as U+FFFD."""
        if self._tables is not None:
            table = self._tables[0]
            if not 0 <= token_id < len(table) or self.core.id_to_token(token_id) is None:
                return None
            return table[token_id].decode(errors="replace")
        if self.id_to_token(token_id) is None:
            return None
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, *, skip_special_tokens: bool = False) -> Sequence[bytes] | None:
        """By id, the bytes that a token stands for; None where that depends on the tokens around it.

        With `skip_special_tokens`, special tokens stand for nothing. The table is shared: do not change it.
        """
        return None if self._tables is None else self._tables[skip_special_tokens]


def _byte_rule(core: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes] | None, bool]:
    """How the decoder turns one token into bytes, and whether it drops a text's first space.

    None where the decoder is not one that works token by token.
    """
    if core.decoder is None:
        return None, False
    decoder = json.loads(core.decoder.__getstate__())
    steps = [
        {k: v for k, v in step.items() if k != "trim_offsets"} for step in decoder.get("decoders", [decoder])
    ]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == _REPLACE_MARK:
        if steps[3:] == [_STRIP]:
            return _marked, True
        if not steps[3:]:
            return _marked, False
    return None, False


_REPLACE_MARK: dict[str, Any] = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
_STRIP: dict[str, Any] = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes, as GPT-2 introduced them: printable
    Latin-1 stands for itself, the other bytes in their order for U+0100 onwards."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:  # an added token, written as it is
        return token.encode()


_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def _marked(token: str) -> bytes:
    return _BYTE_TOKENS.get(token) or token.replace(SPACE_MARK, " ").encode()
