"""Builds `tokenizers.Tokenizer` objects while the program's other threads keep running.

Every constructor and every `from_file` of `tokenizers` keeps Python's global lock from beginning to
end: half a second for a vocabulary of 150,000, in which the caller's event loop stands still whatever
thread does the work. So a BPE model, by far the largest part, is taken out of the file and handed over
through objects that run a little Python on the way, where the interpreter may switch threads. What
remains locked is the indexing at the end, about a fifth of `from_file`.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken, models

from ..errors import ModelLoadError

__all__ = ["add_tokens", "build_bpe", "read_tokenizer_json"]

PAUSE_EVERY = 256

_BPE_OPTIONS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
_TINY_MODEL = {"type": "WordLevel", "vocab": {}, "unk_token": ""}


class _PausingId:
    """An integer whose conversion runs Python code."""

    __slots__ = ("_value",)

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value


class _PausingMerges(Sequence[Any]):
    """A sequence whose iteration runs Python code."""

    def __init__(self, merges: Sequence[Any]) -> None:
        self._merges = merges

    def __len__(self) -> int:
        return len(self._merges)

    def __getitem__(self, index: Any) -> Any:
        return self._merges[index]

    def __iter__(self) -> Iterator[Any]:
        yield from self._merges


def build_bpe(vocab: dict[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> models.BPE:
    """A BPE model of `vocab` (token → id; altered here, so hand over your own) and `merges`, best first.

    Raises `ModelLoadError` if a merge makes a token that is not in the vocabulary.
    """
    for number, token in enumerate(vocab):
        if number % PAUSE_EVERY == 0:
            vocab[token] = _PausingId(vocab[token])  # type: ignore[assignment]
    try:
        return models.BPE(vocab, _PausingMerges(merges), **options)
    except Exception as error:
        raise ModelLoadError(f"the tokenizer's vocabulary and merges do not fit together: {error}") from error


def add_tokens(core: tokenizers.Tokenizer, tokens: Sequence[AddedToken]) -> None:
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


def read_tokenizer_json(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer that a `tokenizer.json` describes, without its truncation and padding.

    Raises `ModelLoadError` where the file is damaged or of a kind that `tokenizers` does not know.
    """
    try:
        with open(path, "rb") as file:
            parts = msgspec.json.decode(file.read(), type=dict[str, msgspec.Raw])
        for name in ("truncation", "padding"):
            parts[name] = msgspec.Raw(b"null")
        kind = msgspec.json.decode(parts["model"], type=dict[str, msgspec.Raw])
        if msgspec.json.decode(kind.get("type", b"null")) == "BPE":
            return _read_bpe(parts, kind)
        core: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(msgspec.json.encode(parts))
        return core
    except ModelLoadError as error:
        raise ModelLoadError(f"{os.fspath(path)}: {error}") from error
    except FileNotFoundError as error:
        raise ModelLoadError(f"{os.fspath(path)} does not exist") from error
    except Exception as error:  # tokenizers raises plain Exception for everything
        raise ModelLoadError(
            f"{os.fspath(path)} is not a tokenizer.json that can be read: {error}"
        ) from error


def _read_bpe(parts: dict[str, msgspec.Raw], model: dict[str, msgspec.Raw]) -> tokenizers.Tokenizer:
    vocab = msgspec.json.decode(model["vocab"], type=dict[str, int])
    merges = msgspec.json.decode(model["merges"], type=list[tuple[str, str] | str])
    pairs = [_pair(merge) if isinstance(merge, str) else merge for merge in merges]
    options = {name: msgspec.json.decode(model[name]) for name in _BPE_OPTIONS if name in model}
    added = msgspec.json.decode(parts.get("added_tokens", b"null"), type=list[dict[str, Any]] | None)

    shell = {**parts, "model": _TINY_MODEL, "added_tokens": []}
    core: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(msgspec.json.encode(shell))
    core.model = build_bpe(
        vocab, pairs, **{name: value for name, value in options.items() if value is not None}
    )
    add_tokens(core, [AddedToken(**{k: v for k, v in token.items() if k != "id"}) for token in added or ()])
    return core


def _pair(merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator or " " in right:
        raise ModelLoadError(f"the tokenizer's merge {merge!r} is not two tokens with a space between")
    return left, right
