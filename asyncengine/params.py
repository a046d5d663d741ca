"""Sampling parameters: one frozen struct whose ranges are checked when it is made.

What needs the model to check (token ids against the vocabulary, lengths against `max_model_len`)
is checked once more at the door, in `llm.py`.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from .errors import InvalidRequestError

__all__ = ["SamplingParams", "StructuredOutputs"]

MAX_N = 1024
MAX_STOPS = 64
MAX_STOP_LENGTH = 4096
MAX_STOP_TOKEN_IDS = 256
MAX_TOKENS = 2**31 - 1

_TUPLES = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")
_ALIASES = {"max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """A constraint on the output's form; exactly one field is set. Not served by this version."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None


def _canonical(cls: type["SamplingParams"], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under their own names. Raises for unknown ones, and where one comes under two names."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        field = _ALIASES.get(name, name)
        if field not in cls.__struct_fields__:
            raise InvalidRequestError(
                f"{name!r} is not a sampling parameter; known: {', '.join(cls.__struct_fields__)}",
                parameter=name,
                value=value,
            )
        if field in values:
            raise InvalidRequestError(
                f"{field!r} is given under two names; pass one of them", parameter=name, value=value
            )
        values[field] = value
    return values


class _TakesAliases(msgspec.StructMeta):
    if not TYPE_CHECKING:  # to type checkers the constructor is the struct's own

        def __call__(cls, **fields):
            return super().__call__(**_canonical(cls, fields))


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=_TakesAliases
):
    """How tokens are drawn and when to stop. Raises `InvalidRequestError` naming the wrong field.

    The order of operations on a position's logits: penalties, `min_tokens` mask, temperature,
    top-k, top-p, min-p, draw. Logprobs are of the raw model distribution, before all of these.
    `max_new_tokens` and `max_completion_tokens` are taken as other names of `max_tokens`.
    """

    n: int = 1
    """Completions drawn from one prompt; they share its memory."""
    temperature: float = 1.0
    """0 is greedy: the most likely token, whatever top_p, top_k, min_p and seed say."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 is off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """A seeded request draws the same tokens whatever else runs beside it. None: a seed from the engine's own
    and the request's number."""
    max_tokens: int | None = None
    """None: up to the end of the context."""
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the most likely tokens to report besides the sampled one; 0 is that one alone."""
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        # Declared types are only enforced by decoding, and callers construct this directly.
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for name in _TUPLES:
            value = getattr(self, name)
            if isinstance(value, (list, set, frozenset, range)):
                msgspec.structs.force_setattr(self, name, tuple(value))
            elif value is None and name != "allowed_token_ids":
                msgspec.structs.force_setattr(self, name, ())
        _integer(self, "n", 1, MAX_N)
        _real(self, "temperature", 0.0, 100.0)
        _real(self, "top_p", 0.0, 1.0, open_low=True)
        _integer(self, "top_k", -1, 2**31 - 1)
        _real(self, "min_p", 0.0, 1.0)
        _real(self, "presence_penalty", -2.0, 2.0)
        _real(self, "frequency_penalty", -2.0, 2.0)
        _real(self, "repetition_penalty", 0.0, 100.0, open_low=True)
        _integer(self, "seed", -(2**63), 2**63 - 1, optional=True)
        _integer(self, "max_tokens", 1, MAX_TOKENS, optional=True)
        _integer(self, "min_tokens", 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse(self, "min_tokens", f"must not exceed max_tokens ({self.max_tokens})")
        _sequence(self, "stop", str, MAX_STOPS)
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                _refuse(self, "stop", f"needs strings of 1 to {MAX_STOP_LENGTH} characters")
        if self.stop and not self.detokenize:
            _refuse(self, "stop", "needs detokenize=True: stop strings are matched in the text")
        _sequence(self, "stop_token_ids", int, MAX_STOP_TOKEN_IDS)
        _integer(self, "logprobs", 0, 2**31 - 1, optional=True)
        for flag in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, flag), bool):
                _refuse(self, flag, "must be True or False")
        if self.spaces_between_special_tokens is not True:
            _refuse(
                self,
                "spaces_between_special_tokens",
                "cannot be switched off: it only concerns slow tokenizers, which are not used here",
            )
        for name, instead in _UNSERVED.items():
            if getattr(self, name) not in (None, (), {}):
                _refuse(self, name, f"is not supported in this version; {instead}")

    @classmethod
    def from_fields(
        cls,
        fields: Mapping[str, Any],
        *,
        base: "SamplingParams | None" = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> "SamplingParams":
        """Makes parameters from keyword arguments as `generate(...)` takes them.

        `fields` override `base`; with no `base`, `defaults` (the model's generation_config) fill what
        `fields` leave out.
        """
        values: dict[str, Any] = {}
        if base is not None:
            if not isinstance(base, SamplingParams):
                raise InvalidRequestError(
                    f"sampling_params must be a SamplingParams, not {type(base).__name__}",
                    parameter="sampling_params",
                    value=base,
                )
            values = msgspec.structs.asdict(base)
        elif defaults:
            values = dict(defaults)
        return cls(**(values | _canonical(cls, fields)))


_UNSERVED = {
    "prompt_logprobs": "`logprobs` gives those of generated tokens",
    "logit_bias": "leave it out",
    "allowed_token_ids": "leave it out",
    "bad_words": "use `stop` to end at a word",
    "structured_outputs": "ask for the form in the prompt and validate the text",
}


def _refuse(params: SamplingParams, name: str, rule: str) -> NoReturn:
    value = getattr(params, name)
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    raise InvalidRequestError(f"{name}={shown} {rule}", parameter=name, value=value)


def _integer(params: SamplingParams, name: str, low: int, high: int, *, optional: bool = False) -> None:
    value = getattr(params, name)
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(params, name, "must be an integer")
    if not low <= value <= high:
        _refuse(params, name, f"must lie in [{low}, {high}]")


def _real(params: SamplingParams, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    value = getattr(params, name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        _refuse(params, name, "must be a number")
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        _refuse(params, name, f"must be finite and lie in {'(' if open_low else '['}{low:g}, {high:g}]")


def _sequence(params: SamplingParams, name: str, kind: type, limit: int) -> None:
    value = getattr(params, name)
    if not isinstance(value, tuple) or any(not isinstance(v, kind) or isinstance(v, bool) for v in value):
        _refuse(params, name, f"must be a tuple of {kind.__name__} values")
    if len(value) > limit:
        _refuse(params, name, f"has {len(value)} entries; at most {limit} are taken")
