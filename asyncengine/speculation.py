"""What a caller asks of speculation: the engine argument `speculative`."""

from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from .errors import ConfigError

__all__ = ["MAX_DRAFT_TOKENS", "NgramSpeculation"]

MAX_DRAFT_TOKENS = 64
"""Draft tokens of one step, all sequences together: by then a CPU has long ceased to give any for free."""


class NgramSpeculation(msgspec.Struct, frozen=True, kw_only=True):
    """Speculation by prompt lookup: what followed the last occurrence of a sequence's last tokens is drafted
    and verified in one step. Accepted tokens are those that would have been drawn without it."""

    num_speculative_tokens: int = 8
    """Most draft tokens of a sequence in a step; how many it gets follows from what was accepted of late."""
    prompt_lookup_max: int = 4
    """Longest run of last tokens that is looked for; shorter ones follow, down to `prompt_lookup_min`."""
    prompt_lookup_min: int = 2

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "NgramSpeculation":
        """The engine argument `speculative` as a value. Raises `ConfigError`."""

        def refuse(rule: str) -> NoReturn:
            raise ConfigError(f"speculative={value!r} {rule}", parameter="speculative", value=value)

        if value.get("method") != "ngram":
            refuse("must have 'method': 'ngram', the one that is served")
        for name, number in value.items():
            if name == "method":
                continue
            if name not in _SPECULATIVE_RANGES:
                refuse(
                    f"has {name!r}, which is not one of its keys: method, {', '.join(_SPECULATIVE_RANGES)}"
                )
            low, high = _SPECULATIVE_RANGES[name]
            if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
                refuse(f"must have {name!r} as an integer in [{low}, {high}]")
        numbers = {name: number for name, number in value.items() if name != "method"}
        if "prompt_lookup_min" not in numbers:
            numbers["prompt_lookup_min"] = min(2, numbers.get("prompt_lookup_max", 2))
        if "prompt_lookup_max" not in numbers:
            numbers["prompt_lookup_max"] = max(4, numbers["prompt_lookup_min"])
        made = cls(**numbers)
        if made.prompt_lookup_min > made.prompt_lookup_max:
            refuse("must have 'prompt_lookup_min' at most 'prompt_lookup_max'")
        return made


_SPECULATIVE_RANGES = {
    "num_speculative_tokens": (1, MAX_DRAFT_TOKENS),
    "prompt_lookup_max": (1, 32),
    "prompt_lookup_min": (1, 32),
}
