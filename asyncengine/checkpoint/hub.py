"""From what the user calls a model to files on this machine.

A local directory, a local `.gguf` file, or a Hugging Face Hub id. Pickled weights (`*.bin`, `*.pth`) and
code are never fetched.
"""

import glob
import os
import re
from collections.abc import Iterable
from typing import Literal

import msgspec

from ..errors import ConfigError, ModelLoadError
from .repository import OnProgress, Repository
from .safetensors import INDEX_NAME

__all__ = ["LOAD_FORMATS", "TOKENIZER_FILES", "ModelFiles", "resolve_model"]

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")

TOKENIZER_FILES = [
    "config.json",
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
]
_CONFIG_FILES = [*TOKENIZER_FILES, "generation_config.json"]
_SAFETENSORS = ["*.safetensors", INDEX_NAME]
# What lies in folders is other exports of the model; `consolidated` is Mistral's own naming of the weights.
_IGNORED = ["*/*", "consolidated*", "adapter_*"]
_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_SPLIT = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model lies on this machine."""

    model: str
    """As the caller named it."""
    kind: Literal["safetensors", "gguf", "dummy"]
    directory: str
    """Holds the configuration and the tokenizer, unless these are in the GGUF file."""
    gguf_path: str | None = None
    """The file to read the configuration from, and the weights if `kind` is `gguf`."""
    revision: str | None = None
    """The commit on the Hub; None for local files."""

    @property
    def weights(self) -> str:
        """What `GGUFFile` or `open_safetensors` takes."""
        return self.gguf_path if self.gguf_path is not None else self.directory


def resolve_model(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    load_format: str = "auto",
    on_progress: OnProgress | None = None,
) -> ModelFiles:
    """Finds the model's files and downloads what is missing. Blocks: call it in a thread.

    `model`: an existing directory or `.gguf` file, else a Hub id, `name` or `owner/name`. Of a repository
    with several GGUF files, `owner/name:Q4_K_M` is the one of that name. `revision` is a branch, tag or
    commit, and all files are of that one commit. `download_dir` replaces huggingface_hub's cache folder.
    `on_progress(done, total, unit)` is called from the downloading threads, in bytes, or in files by older
    versions of huggingface_hub; the total grows as files are begun.

    Raises `ConfigError` for arguments that cannot be, `ModelLoadError` where the model is not there.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"load_format={load_format!r} is not known; known: {', '.join(LOAD_FORMATS)}",
            parameter="load_format",
            value=load_format,
        )
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise ConfigError("model must be a path or a Hugging Face Hub id", parameter="model", value=model)
    name = os.fsdecode(model)
    path = os.path.expanduser(name)
    if os.path.exists(path):
        if revision is not None:
            raise ConfigError(
                f"revision={revision!r} is for models on the Hub, but {name} is a local path",
                parameter="revision",
                value=revision,
            )
        return _local(name, path, load_format)
    repository, colon, wanted = name.partition(":")
    plausible = (
        _ID.fullmatch(repository) and len(repository) <= 96 and not re.search(r"--|\.\.|\.git$", repository)
    )
    if not plausible or name.endswith((".gguf", ".safetensors")):
        raise ModelLoadError(
            f"{name!r} is neither an existing path nor a Hugging Face Hub id such as 'Qwen/Qwen3-0.6B'"
        )
    if load_format == "safetensors" and colon:
        raise ModelLoadError(f"{name!r} names a GGUF file, but load_format is 'safetensors'")
    hub = Repository(repository, revision, token, download_dir, on_progress)
    return _remote(name, hub, wanted, load_format)


def _local(name: str, path: str, load_format: str) -> ModelFiles:
    if os.path.isfile(path):
        if not path.endswith(".gguf"):
            raise ModelLoadError(f"{name} is not a .gguf file; of other models, pass the directory")
        if load_format == "safetensors":
            raise ModelLoadError(f"{name} is a GGUF file, but load_format is 'safetensors'")
        return _gguf(name, os.path.dirname(path) or ".", os.path.basename(path), load_format, None)
    try:
        names = os.listdir(path)
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror or error}") from error
    return _choose(name, path, names, load_format)


def _choose(
    name: str, directory: str, names: Iterable[str], load_format: str, *, revision: str | None = None
) -> ModelFiles:
    """The model among the files of a directory."""
    names = sorted(names)
    if load_format == "dummy" and "config.json" in names:
        return ModelFiles(model=name, kind="dummy", directory=directory, revision=revision)
    if load_format in ("auto", "safetensors"):
        if any(n.endswith(".safetensors") for n in names):
            return ModelFiles(model=name, kind="safetensors", directory=directory, revision=revision)
        if load_format == "safetensors":
            raise ModelLoadError(f"{name} holds no *.safetensors file{_pickled(names)}")
    chosen = _choose_gguf(name, names, "", "the path of one")
    return _gguf(name, directory, chosen, load_format, revision)


def _gguf(name: str, directory: str, chosen: str, load_format: str, revision: str | None) -> ModelFiles:
    return ModelFiles(
        model=name,
        kind="dummy" if load_format == "dummy" else "gguf",
        directory=directory,
        gguf_path=os.path.join(directory, chosen),
        revision=revision,
    )


def _choose_gguf(name: str, names: Iterable[str], wanted: str, instead: str) -> str:
    """The one GGUF model among `names`; of a model in several files the first."""
    names = sorted(names)
    models = [n for n in names if n.endswith(".gguf") and not os.path.basename(n).startswith("mmproj")]
    models = [n for n in models if (part := _SPLIT.search(n)) is None or part[1] == "00001"]
    if wanted:
        tag = re.compile(rf"(?:^|[-._/]){re.escape(wanted)}(?:[-./]|$)", re.IGNORECASE)
        found = [n for n in models if n == wanted or tag.search(n)]
    else:
        found = models
    if len(found) == 1:
        return found[0]
    if not models:
        raise ModelLoadError(f"{name} holds neither *.safetensors nor *.gguf files{_pickled(names)}")
    shown = ", ".join(models[:24]) + (", …" if len(models) > 24 else "")
    if not found:
        raise ModelLoadError(f"{name} holds no GGUF file of that name; it holds {shown}")
    raise ModelLoadError(f"{name} holds {len(found)} GGUF models; pass {instead}: {shown}")


def _pickled(names: Iterable[str]) -> str:
    if any(n.endswith((".bin", ".pth", ".pt")) for n in names):
        return "; its pickled weights (*.bin, *.pth) are never loaded, because they can run any code"
    return ""


def _remote(name: str, hub: Repository, wanted: str, load_format: str) -> ModelFiles:
    weights = _SAFETENSORS if load_format in ("auto", "safetensors") and not wanted else []
    directory = hub.download(_CONFIG_FILES + weights, _IGNORED)
    commit = os.path.basename(directory)
    # Where no file matched, there is no folder either.
    names = os.listdir(directory) if os.path.isdir(directory) else []
    found = weights and any(n.endswith(".safetensors") for n in names)
    if found or (load_format == "dummy" and "config.json" in names):
        return _choose(name, directory, names, load_format, revision=commit)
    names = hub.files(directory, commit)
    if load_format == "safetensors":
        return _choose(name, directory, (n for n in names if "/" not in n), load_format, revision=commit)
    chosen = _choose_gguf(name, names, wanted, f"'{hub.repository}:NAME'")
    pattern = glob.escape(chosen)
    if _SPLIT.search(chosen):
        pattern = glob.escape(_SPLIT.sub("", chosen)) + "-*-of-*.gguf"
    hub.download([pattern], None, commit=commit)
    return _gguf(name, directory, chosen, load_format, commit)
