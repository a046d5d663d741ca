"""Reads `tokenizer.json`, the format of the tokenizers library.

`Tokenizer.from_file` keeps Python's global lock throughout: half a second for a vocabulary of 150,000. So
BPE models, by far the largest parts of such files, are read here, piece by piece (see also `bpe`).
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import tokenizers
from tokenizers import AddedToken

from ..errors import ModelLoadError
from .bpe import LateMerges, split_bpe

__all__ = ["Parts", "add_tokens", "read_tokenizer_json"]

_BPE_OPTIONS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
_NO_MODEL = {"type": "WordLevel", "vocab": {}, "unk_token": ""}


class Parts(NamedTuple):
    """What a `Tokenizer` is made of: `core` does the work but for the late merges."""

    core: tokenizers.Tokenizer
    late: LateMerges | None = None
    tokens: Sequence[str | None] | None = None
    """By id. None: `core` knows them all."""


def add_tokens(core: tokenizers.Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Adds tokens in the order given; the ids of new ones follow the vocabulary in that order."""
    batch: list[AddedToken] = []
    for token in tokens:
        if batch and batch[0].special != token.special:
            _add_batch(core, batch)
            batch = []
        batch.append(token)
    _add_batch(core, batch)


def _add_batch(core: tokenizers.Tokenizer, batch: list[AddedToken]) -> None:
    if batch and batch[0].special:
        core.add_special_tokens(batch)
    elif batch:
        core.add_tokens(batch)


def read_tokenizer_json(path: str | os.PathLike[str], more: Sequence[AddedToken] = ()) -> Parts:
    """The tokenizer that a file describes, without its truncation and padding.

    Of the added tokens in `more`, those that the file has not are added too. Raises `ModelLoadError` where
    the file is damaged or of a kind that `tokenizers` does not know.
    """
    try:
        with open(path, "rb") as file:
            fields = msgspec.json.decode(file.read(), type=dict[str, msgspec.Raw])
        for name in ("truncation", "padding"):
            fields[name] = msgspec.Raw(b"null")
        model = msgspec.json.decode(fields["model"], type=dict[str, msgspec.Raw])
        declared = msgspec.json.decode(fields.get("added_tokens", b"null"), type=list[dict[str, Any]] | None)
        added = [AddedToken(**{k: v for k, v in token.items() if k != "id"}) for token in declared or ()]
        known = {token.content for token in added}
        added += [token for token in more if token.content not in known]
        if msgspec.json.decode(model.get("type", b"null")) == "BPE":
            return _read_bpe(fields, model, added)
        core: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(msgspec.json.encode(fields))
        add_tokens(core, added[len(known) :])
        return Parts(core)
    except ModelLoadError as error:
        raise ModelLoadError(f"{os.fspath(path)}: {error}") from error
    except FileNotFoundError as error:
        raise ModelLoadError(f"{os.fspath(path)} does not exist") from error
    except Exception as error:  # tokenizers raises plain Exception for everything
        raise ModelLoadError(
            f"{os.fspath(path)} is not a tokenizer.json that can be read: {error}"
        ) from error


def _read_bpe(
    fields: dict[str, msgspec.Raw], model: dict[str, msgspec.Raw], added: list[AddedToken]
) -> Parts:
    vocab = _vocab(model["vocab"])
    merges = [_pair(merge) for merge in _values(model["merges"])]
    options = {name: msgspec.json.decode(model[name]) for name in _BPE_OPTIONS if name in model}
    options = {name: value for name, value in options.items() if value is not None}
    core: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(
        msgspec.json.encode({**fields, "model": _NO_MODEL, "added_tokens": []})
    )
    split = split_bpe(vocab, merges, added, **options)
    core.model = split.model
    add_tokens(core, added)
    return Parts(core, split.late, split.tokens)


# JSON's own reader, a value at a time: other threads may run between two values.
_scan = json.JSONDecoder().raw_decode
_gap = re.compile(r"[\s,:]*")


def _values(container: msgspec.Raw) -> Iterator[Any]:
    """The values in a JSON array or object (there keys and values by turns) that is well-formed."""
    text = bytes(container).decode().strip()
    at = _gap.match(text, 1).end()  # type: ignore[union-attr]
    while at < len(text) - 1:
        value, at = _scan(text, at)
        yield value
        at = _gap.match(text, at).end()  # type: ignore[union-attr]


def _vocab(container: msgspec.Raw) -> dict[str, int]:
    keys_and_values = _values(container)
    vocab = dict(zip(keys_and_values, keys_and_values, strict=True))
    if not all(type(token) is str and type(i) is int for token, i in vocab.items()):
        raise ModelLoadError("the tokenizer's vocabulary is not of tokens and their ids")
    return vocab


def _pair(merge: Any) -> tuple[str, str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise ModelLoadError(f"the tokenizer's merge {merge!r} is not two tokens")
    return pair[0], pair[1]
