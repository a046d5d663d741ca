"""Finds and reads a tokenizer in a model's directory or on the Hub."""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from typing import Any

import msgspec
from tokenizers import AddedToken

from ..checkpoint.gguf import GGUFFile
from ..checkpoint.hub import TOKENIZER_FILES
from ..checkpoint.repository import Repository
from ..errors import ModelLoadError
from .gguf_tokenizer import load_gguf_tokenizer
from .tokenizer import Tokenizer
from .tokenizer_json import read_tokenizer_json

__all__ = ["load_tokenizer"]

_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

# Runs in a process of its own: transformers may import torch, and a repository's code may do anything.
_CONVERT = """
import json, sys
from transformers import AutoTokenizer
source, target, trust = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust == "trust")
core = getattr(tokenizer, "backend_tokenizer", None)
if core is None:
    sys.exit(f"{type(tokenizer).__name__} has no form that the tokenizers library can run")
core.save(target + "/tokenizer.json")
config = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
config["chat_template"] = tokenizer.chat_template
with open(target + "/tokenizer_config.json", "w") as file:
    json.dump(config, file)
"""


def load_tokenizer(
    source: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    download_dir: str | os.PathLike[str] | None = None,
) -> Tokenizer:
    """The tokenizer of a local directory, a `.gguf` file, or a Hugging Face Hub repository.

    `tokenizer.json` is read as it is, and as in transformers 5 it alone decides whether BOS and EOS are
    added, not the flags in tokenizer_config.json. Where a directory has only the files of older kinds of
    tokenizers, transformers converts them, if it is installed, in a process of its own;
    `trust_remote_code` lets that process run the repository's code. Blocks: call it in a thread.

    Raises `ModelLoadError` where there is no tokenizer or it cannot be read.
    """
    path = os.path.expanduser(os.fspath(source))
    if os.path.isfile(path):
        if not path.endswith(".gguf"):
            raise ModelLoadError(f"{path} is a file; pass the directory that holds tokenizer.json")
        checkpoint = GGUFFile(path)
        metadata = checkpoint.metadata
        checkpoint.close()
        return load_gguf_tokenizer(metadata)
    if not os.path.isdir(path):
        path = _download(os.fspath(source), revision, token, download_dir)
    if os.path.exists(os.path.join(path, "tokenizer.json")):
        return _read_directory(path)
    if not any(os.path.exists(os.path.join(path, name)) for name in _SLOW_FILES) and not trust_remote_code:
        raise ModelLoadError(
            f"{path} holds no tokenizer; pass tokenizer= (a directory or a Hub id that has one), "
            "or skip_tokenizer_init=True to work with token ids"
        )
    return _convert(path, trust_remote_code)


def _read_directory(path: str) -> Tokenizer:
    config = _read_json(path, "tokenizer_config.json")
    roles = {
        **_read_json(path, "special_tokens_map.json"),
        **{k: v for k, v in config.items() if v is not None},
    }
    special = {role: text for role in _ROLES if (text := _content(roles.get(role))) is not None}
    try:
        declared = _declared_tokens(config, special)
    except Exception as error:
        raise ModelLoadError(f"{path}/tokenizer_config.json has damaged added tokens: {error!r}") from error
    parts = read_tokenizer_json(os.path.join(path, "tokenizer.json"), declared)
    return Tokenizer(parts, special_tokens=special, chat_template=_chat_template(path, config))


def _declared_tokens(config: dict[str, Any], special: dict[str, str]) -> list[AddedToken]:
    """Added tokens as tokenizer_config.json has them; tokenizer.json need not have all of these."""
    declared = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    tokens = {spec["content"]: AddedToken(**spec) for _, spec in declared}
    for text in special.values():
        tokens.setdefault(text, AddedToken(text, special=True))
    return list(tokens.values())


def _chat_template(path: str, config: dict[str, Any]) -> str | dict[str, str] | None:
    """chat_template.jinja before chat_template.json before tokenizer_config.json, as in transformers."""
    templates: dict[str, str] = {}
    folder = os.path.join(path, "additional_chat_templates")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if name.endswith(".jinja"):
            templates[name.removesuffix(".jinja")] = _read_text(os.path.join(folder, name))
    file = os.path.join(path, "chat_template.jinja")
    if os.path.exists(file):
        default: Any = _read_text(file)
    else:
        default = _read_json(path, "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(default, list):
        try:
            default = {entry["name"]: entry["template"] for entry in default}
        except (KeyError, TypeError) as error:
            raise ModelLoadError(f"{path}: the list of chat templates is damaged: {error!r}") from error
    if isinstance(default, dict):
        return {**default, **templates}
    if default is not None and not isinstance(default, str):
        raise ModelLoadError(f"{path}: the chat template is of type {type(default).__name__}, not a string")
    return {**({} if default is None else {"default": default}), **templates} if templates else default


def _convert(path: str, trust_remote_code: bool) -> Tokenizer:
    if find_spec("transformers") is None:
        raise ModelLoadError(
            f"{path} has no tokenizer.json, and to convert the tokenizer it has, transformers is needed: "
            "pip install transformers sentencepiece; or pass tokenizer="
        )
    with tempfile.TemporaryDirectory(prefix="asyncengine-tokenizer-") as target:
        run = subprocess.run(
            [sys.executable, "-P", "-c", _CONVERT, path, target, "trust" if trust_remote_code else "no"],
            env={**os.environ, "USE_TORCH": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if run.returncode != 0:
            lines = run.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise ModelLoadError(
                f"transformers cannot convert the tokenizer in {path}: {lines[-1]}. Pass tokenizer= "
                "(a directory or Hub id that has a tokenizer.json), trust_remote_code=True if it needs "
                "the repository's code, or skip_tokenizer_init=True"
            )
        return _read_directory(target)


def _download(
    name: str, revision: str | None, token: str | bool | None, download_dir: str | os.PathLike[str] | None
) -> str:
    hub = Repository(name, revision, token, download_dir, None)
    return hub.download([*TOKENIZER_FILES, "additional_chat_templates/*.jinja"], None)


def _read_json(path: str, name: str) -> dict[str, Any]:
    file = os.path.join(path, name)
    if not os.path.exists(file):
        return {}
    try:
        values: dict[str, Any] = msgspec.json.decode(_read_text(file), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ModelLoadError(f"{file} is not a JSON object: {error}") from error
    return values


def _read_text(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as handle:
            return handle.read()
    except (OSError, UnicodeError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error


def _content(token: Any) -> str | None:
    """A special token: a string, or an object that has it as `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None
