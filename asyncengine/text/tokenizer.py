"""Text to token ids and back."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import processors

from ..errors import InvalidRequestError
from .tokenizer_json import Parts

__all__ = ["INLINE_CHARACTERS", "Tokenizer"]

INLINE_CHARACTERS = 4096
"""Texts up to this length take at most a few milliseconds; tokenize longer ones in a thread."""

SPACE_MARK = "▁"
ChatTemplates = str | Mapping[str, str]


class Tokenizer:
    """A model's tokenizer with its special tokens and chat templates. Safe to use from any thread.

    `parts` do the work. `special_tokens` maps roles (`bos_token`, `eos_token`, `unk_token`, ...)
    to tokens. `add_bos` and `add_eos` say whether `encode` adds these; None leaves it to `parts.core`.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        special_tokens: Mapping[str, str] | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        chat_template: ChatTemplates | None = None,
    ) -> None:
        self._core = core = parts.core
        self._late = parts.late
        added = core.get_added_tokens_decoder()
        if parts.tokens is not None:
            self._tokens = parts.tokens
        else:
            size = max([core.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
            self._tokens = [core.id_to_token(i) for i in range(size)]
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        self.bos_token_id = None if self.bos_token is None else self.token_to_id(self.bos_token)
        self.eos_token_id = None if self.eos_token is None else self.token_to_id(self.eos_token)
        if add_bos is not None or add_eos is not None:
            self._frame(bool(add_bos), bool(add_eos))
        self.vocab_size = sum(token is not None for token in self._tokens)
        """How many tokens there are. A model's output may be wider: vocabularies are often padded."""
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Ids that `skip_special_tokens` leaves out."""
        to_bytes, self.strips_first_space = _byte_rule(core)
        self._tables = None if to_bytes is None else self._make_tables(to_bytes)

    def _frame(self, bos: bool, eos: bool) -> None:
        """Makes `encode` put `bos_token` before and `eos_token` behind a text."""
        before = [("BOS", self.bos_token_id, self.bos_token)] if bos and self.bos_token_id is not None else []
        after = [("EOS", self.eos_token_id, self.eos_token)] if eos and self.eos_token_id is not None else []
        names = [*(name for name, *_ in before), "$A", *(name for name, *_ in after)]
        self._core.post_processor = processors.TemplateProcessing(
            single=names,
            pair=[*names, *(f"{name.replace('$A', '$B')}:1" for name in names)],
            special_tokens=[{"id": name, "ids": [i], "tokens": [text]} for name, i, text in before + after],
        )

    def _make_tables(self, to_bytes: Callable[[str], bytes]) -> tuple[list[bytes], list[bytes]]:
        table = [b"" if token is None else to_bytes(token) for token in self._tokens]
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
                encoding = self._core.encode(text, add_special_tokens=add_special_tokens)
            else:
                # Only the batched calls let go of Python's global lock.
                encoding = self._core.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except (TypeError, UnicodeError) as error:
            if not isinstance(text, str):
                rule = f"must be a string, not {type(text).__name__}"
            else:
                rule = f"cannot be written in UTF-8, it has lone surrogates: {error}"
            raise InvalidRequestError(f"the prompt {rule}", parameter="prompt", value=text) from error
        ids: list[int] = encoding.ids
        return ids if self._late is None else self._late.apply(ids, encoding.word_ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no character become U+FFFD. Unknown ids are left out."""
        hidden = self.special_ids if skip_special_tokens else ()
        try:
            known = [self.id_to_token(i) for i in ids if i not in hidden]
        except TypeError as error:
            raise InvalidRequestError(
                f"ids must be a sequence of token ids: {error}", parameter="ids", value=ids
            ) from error
        tokens = [token for token in known if token is not None]
        text: str = " ".join(tokens) if self._core.decoder is None else self._core.decoder.decode(tokens)
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None."""
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        try:
            return self._tokens.index(token)
        except ValueError:
            return None

    def token_text(self, token_id: int) -> str | None:
        """One token as text, with its leading space; a part of a character shows as U+FFFD."""
        if self.id_to_token(token_id) is None:
            return None
        if self._tables is not None:
            return self._tables[0][token_id].decode(errors="replace")
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
