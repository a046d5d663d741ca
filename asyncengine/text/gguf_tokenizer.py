"""The tokenizer that a GGUF file's metadata describes.

A GGUF file has the vocabulary, but of the rules only names: `tokenizer.ggml.model` for the algorithm and
`tokenizer.ggml.pre` for how text is split before merging. The rules behind the names are those of the
models' own `tokenizer.json`, to which llama.cpp's tables of names refer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from ..errors import ModelLoadError
from .bpe import LateMerges, split_bpe
from .tokenizer import SPACE_MARK, Tokenizer
from .tokenizer_json import Parts, add_tokens

__all__ = ["load_gguf_tokenizer"]

CONTROL, USER_DEFINED = 3, 4

_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_CHAT_TEMPLATE = "tokenizer.chat_template"


class _Pre(NamedTuple):
    """What comes before the merges in a byte-level tokenizer."""

    split: str | None = None
    """None: the split that GPT-2 has."""
    digits: bool = False
    """Every digit is on its own before the split."""
    nfc: bool = False
    whole_words: bool = False
    """A word that is in the vocabulary is that token, whatever the merges say."""
    add_bos: bool = False


_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

_GPT2_PRE = _Pre()
_LLAMA3_PRE = _Pre(_LLAMA3, whole_words=True, add_bos=True)
_PRE = {
    "default": _GPT2_PRE,
    "gpt-2": _GPT2_PRE,
    "smollm": _Pre(digits=True),
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "falcon3": _LLAMA3_PRE,
    "smaug-bpe": _Pre(_LLAMA3),
    "qwen2": _Pre(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Pre(_QWEN2),
    "tekken": _Pre(_TEKKEN, whole_words=True, add_bos=True),
}


def load_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer from a GGUF file's metadata (`GGUFFile(path).metadata`).

    Raises `ModelLoadError` for metadata that is incomplete or contradicts itself, and for kinds of
    tokenizers that are not known.
    """
    kind = _get(metadata, "model", str)
    tokens = _strings(metadata, "tokens")
    special = {
        f"{role}_token": tokens[i]
        for key, role in _ROLES.items()
        if (i := _token_id(metadata, key, tokens)) is not None
    }
    added = _added_tokens(metadata, tokens, special.values())
    if kind == "gpt2":
        core, late, add_bos = _byte_level(metadata, tokens, added)
    elif kind == "llama":
        core, late, add_bos = _sentencepiece(metadata, tokens, added)
    else:
        raise _unknown("model", kind, ("gpt2", "llama"))
    add_tokens(core, added)
    return Tokenizer(
        Parts(core, late, tokens),
        special_tokens=special,
        add_bos=_get(metadata, "add_bos_token", bool, add_bos),
        add_eos=_get(metadata, "add_eos_token", bool, False),
        chat_template=_chat_templates(metadata),
    )


_Built = tuple[tokenizers.Tokenizer, LateMerges | None, bool]
"""The core, its late merges, and whether BOS is added where the file does not say."""


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], added: list[AddedToken]) -> _Built:
    """Byte-level BPE, as GPT-2 introduced it."""
    name = _get(metadata, "pre", str, "default")
    pre = _PRE.get(name)
    if pre is None:
        raise _unknown("pre", name, _PRE)
    merges = [_pair(merge) for merge in _strings(metadata, "merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    split = split_bpe(vocab, merges, added, ignore_merges=pre.whole_words)
    core: tokenizers.Tokenizer = tokenizers.Tokenizer(split.model)
    if pre.nfc:
        core.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return core, split.late, pre.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], added: list[AddedToken]) -> _Built:
    """SentencePiece's BPE: spaces are written as a mark, unknown characters as their bytes."""
    vocab = {token: i for i, token in enumerate(tokens)}
    if _KEY + "merges" in metadata:
        merges = [_pair(merge) for merge in _strings(metadata, "merges")]
    else:
        scores = _get(metadata, "scores", list)
        if len(scores) != len(tokens):
            raise ModelLoadError(f"the GGUF file has {len(scores)} token scores for {len(tokens)} tokens")
        merges = _merges_of_scores(vocab, scores)
    split = split_bpe(vocab, merges, added, fuse_unk=True, byte_fallback=True)
    core: tokenizers.Tokenizer = tokenizers.Tokenizer(split.model)
    prefix = _get(metadata, "add_space_prefix", bool, True)
    core.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE_MARK, prepend_scheme="first" if prefix else "never", split=False
    )
    steps: list[Any] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core, split.late, True


def _merges_of_scores(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for.

    It joins the two neighbours that make the token of the highest score; so each way to cut a token into
    two others is a merge, and those of a higher score come first. Among the cuts of one score the order
    is that of Hugging Face's converters: longer left part, then longer right part, then lower ids.
    """
    of_score: dict[float, list[tuple[str, str]]] = {}
    for token, i in vocab.items():
        cuts = [(token[:n], token[n:]) for n in range(1, len(token))]
        known = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        known.sort(key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        of_score.setdefault(scores[i], []).extend(known)
    merges = []
    for score in sorted(of_score, reverse=True):
        merges += sorted(of_score[score], key=lambda cut: (len(cut[0]), len(cut[1])), reverse=True)
    return merges


def _added_tokens(metadata: Mapping[str, Any], tokens: list[str], special: Any) -> list[AddedToken]:
    """Tokens that are matched whole in the text, in the order of their ids."""
    types = _get(metadata, "token_type", list, [])
    control = {*special, *(token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL)}
    whole = control | {token for token, kind in zip(tokens, types, strict=False) if kind == USER_DEFINED}
    return [
        AddedToken(token, normalized=False, special=token in control)
        for token in tokens
        if token in whole and token
    ]


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    named = {
        key.removeprefix(_CHAT_TEMPLATE + "."): value
        for key, value in metadata.items()
        if key.startswith(_CHAT_TEMPLATE + ".") and isinstance(value, str)
    }
    default = metadata.get(_CHAT_TEMPLATE)
    if not isinstance(default, str):
        default = None
    if named and default is not None:
        return {"default": default, **named}
    return named or default


_KEY = "tokenizer.ggml."
_REQUIRED: Any = object()


def _get(metadata: Mapping[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = metadata.get(_KEY + name)
    if value is None and default is not _REQUIRED:
        return default
    if value is None:
        raise ModelLoadError(
            f"the GGUF file has no {_KEY}{name}, so it describes no tokenizer; "
            "pass tokenizer= (the original model's Hub id or directory) or skip_tokenizer_init=True"
        )
    if not isinstance(value, kind):
        raise ModelLoadError(f"the GGUF file's {_KEY}{name} is not of type {kind.__name__}")
    return value


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values: list[str] = _get(metadata, name, list)
    if not all(isinstance(value, str) for value in values):
        raise ModelLoadError(f"the GGUF file's {_KEY}{name} are not all strings")
    return values


def _token_id(metadata: Mapping[str, Any], role: str, tokens: list[str]) -> int | None:
    value: int | None = _get(metadata, f"{role}_token_id", int, None)
    if value is not None and not 0 <= value < len(tokens):
        # Converters write -1, also as an unsigned number, for a token that is not there.
        return None
    return value


def _pair(merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator:
        raise ModelLoadError(f"the GGUF file's merge {merge!r} is not two tokens with a space between")
    return left, right


def _unknown(name: str, value: str, known: Any) -> ModelLoadError:
    return ModelLoadError(
        f"the GGUF file's {_KEY}{name} is {value!r}, which is not known here; "
        "pass tokenizer= (the original model's Hub id or directory) or skip_tokenizer_init=True. "
        f"Known: {', '.join(known)}"
    )
