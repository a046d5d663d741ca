"""What `generation_config.json` says: the model's own sampling defaults and ends of text."""

import os
from typing import Any

import msgspec

from ..errors import InvalidRequestError, ModelLoadError
from ..params import SamplingParams
from .spec import ModelSpec
from .values import load_json, token_ids

__all__ = ["generation_defaults", "generation_eos_ids", "with_eos_ids"]

_GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What `generation_config.json` sets, by the names of `SamplingParams`; {} where there is no such file.

    Only numbers are taken: `do_sample` is ignored, because files that name a temperature mean it.
    """
    path = os.path.join(os.fspath(directory), "generation_config.json")
    config = load_json(path) or {}
    found = {ours: config[name] for name, ours in _GENERATION_FIELDS.items() if config.get(name) is not None}
    try:
        SamplingParams(**found)
    except InvalidRequestError as error:
        raise ModelLoadError(
            f"{path} is not usable ({error}); correct it, or pass generation_config='vllm' to do without"
        ) from error
    return found


def generation_eos_ids(directory: str | os.PathLike[str]) -> tuple[int, ...]:
    """The end-of-text ids of `generation_config.json`, often more than those of `config.json`."""
    config = load_json(os.path.join(os.fspath(directory), "generation_config.json")) or {}
    return token_ids(config.get("eos_token_id"))


def with_eos_ids(spec: ModelSpec, ids: tuple[int, ...]) -> ModelSpec:
    """The model with further end-of-text ids behind its own."""
    return msgspec.structs.replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + ids)))
