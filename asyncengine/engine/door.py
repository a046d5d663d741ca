"""The door: what a caller asks for becomes a request, or is refused before anything is queued."""

import math
import time
from array import array
from collections.abc import Mapping
from typing import Any

from ..checkpoint.spec import ModelSpec
from ..config import EngineConfig
from ..errors import InvalidRequestError
from ..params import SamplingParams
from ..scheduling.sequence import Sequence
from ..text.detokenizer import make_detokenizer
from ..text.tokenizer import Tokenizer
from .request import Request

__all__ = ["Door", "Prompt"]

Prompt = str | list[int]

MAX_REQUEST_ID = 256
MAX_PRIORITY = 2**31 - 1


class Door:
    """Checks requests against one model and its settings, and makes their sequences."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        tokenizer: Tokenizer | None,
        defaults: Mapping[str, Any],
    ) -> None:
        self._config = config
        self._vocab_size = spec.vocab_size
        self._tokenizer = tokenizer
        self._defaults = defaults
        """Sampling defaults from the model's generation_config."""
        self._count = 0

    def params(self, params: SamplingParams | None, fields: Mapping[str, Any]) -> SamplingParams:
        """The request's parameters, checked against the model. An explicit `params` is taken as it is;
        without one, the model's generation_config fills what `fields` leave out."""
        chosen = SamplingParams.from_fields(fields, base=params, defaults=self._defaults)
        for token in chosen.stop_token_ids:
            self._check_token(token, "stop_token_ids")
        if chosen.logprobs is not None and chosen.logprobs > self._config.max_logprobs:
            raise InvalidRequestError(
                f"logprobs={chosen.logprobs} exceeds the engine's max_logprobs={self._config.max_logprobs}",
                parameter="logprobs",
                value=chosen.logprobs,
            )
        if chosen.stop and self._tokenizer is None:
            raise InvalidRequestError(
                "stop strings need a tokenizer, and the engine was created with skip_tokenizer_init=True; "
                "use stop_token_ids",
                parameter="stop",
                value=chosen.stop,
            )
        return chosen

    def request(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str | None,
        taken: Mapping[str, Request],
    ) -> Request:
        """A request with a free id; its prompt is not tokenized yet."""
        self._count += 1
        if request_id is None:
            request_id = f"request-{self._count}"
            while request_id in taken:
                request_id += "+"
        elif not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_REQUEST_ID:
            raise InvalidRequestError(
                f"request_id must be a string of 1 to {MAX_REQUEST_ID} characters",
                parameter="request_id",
                value=request_id,
            )
        if request_id in taken:
            raise InvalidRequestError(
                f"request_id={request_id!r} is in use by a request that has not ended",
                parameter="request_id",
                value=request_id,
            )
        decode = self._tokenizer.token_text if self._tokenizer is not None else _no_text
        text = prompt if isinstance(prompt, str) else None
        return Request(request_id, self._count, text, params, decode)

    def tokenize(self, prompt: Any, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt: a non-empty string, or token ids of the vocabulary."""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequestError(
                    "the engine was created with skip_tokenizer_init=True; pass the prompt as token ids",
                    parameter="prompt",
                    value=prompt,
                )
            ids = self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        elif isinstance(prompt, (list, tuple, array)):
            limit = self._config.max_model_len
            if len(prompt) >= limit:  # before looking at every one of a million ids
                raise InvalidRequestError(
                    f"the prompt has {len(prompt)} tokens; it must have fewer than max_model_len={limit}",
                    parameter="prompt",
                    value=len(prompt),
                )
            ids = list(prompt)
            for token in ids:
                self._check_token(token, "prompt")
        else:
            raise InvalidRequestError(
                f"prompt must be a string or a list of token ids, not {type(prompt).__name__}",
                parameter="prompt",
                value=prompt,
            )
        if not ids:
            raise InvalidRequestError("the prompt is empty", parameter="prompt", value=prompt)
        return ids

    def _check_token(self, token: Any, parameter: str) -> None:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self._vocab_size:
            raise InvalidRequestError(
                f"{parameter} has {token!r}, which is not a token id of this model "
                f"(0 to {self._vocab_size - 1})",
                parameter=parameter,
                value=token,
            )

    def sequences(
        self, request: Request, ids: list[int], *, priority: int, cache_salt: str | None
    ) -> list[Sequence]:
        """The `n` sequences of a request; takes note of the prompt and readies the detokenizers."""
        params = request.params
        request.prompt_token_ids = ids
        prompt = array("i", ids)
        seed = params.seed if params.seed is not None else _derived_seed(self._config.seed, request.number)
        if self._tokenizer is not None and params.detokenize:
            for completion in request.completions:
                completion.detokenizer = make_detokenizer(
                    self._tokenizer, ids, skip_special_tokens=params.skip_special_tokens
                )
        arrival = time.monotonic()
        return [
            Sequence(
                request.id,
                prompt,
                params,
                seed=seed,
                arrival=arrival,
                index=index,
                priority=priority,
                cache_salt=(cache_salt or "").encode(),
            )
            for index in range(params.n)
        ]

    def check_options(self, priority: Any, timeout: Any, cache_salt: Any, lora: Any) -> None:
        """Refuses options of `generate` and `chat` that are of the wrong kind or not served."""
        if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority must be an integer within ±{MAX_PRIORITY}", parameter="priority", value=priority
            )
        if priority and self._config.scheduling_policy != "priority":
            raise InvalidRequestError(
                f"priority={priority} needs an engine created with scheduling_policy='priority'",
                parameter="priority",
                value=priority,
            )
        if timeout is not None and (
            not isinstance(timeout, (int, float))
            or isinstance(timeout, bool)
            or not math.isfinite(timeout)
            or timeout <= 0
        ):
            raise InvalidRequestError(
                "timeout must be a positive number of seconds", parameter="timeout", value=timeout
            )
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise InvalidRequestError("cache_salt must be a string", parameter="cache_salt", value=cache_salt)
        if lora is not None:
            raise InvalidRequestError(
                "lora is not supported in this version; merge the adapter into the model",
                parameter="lora",
                value=lora,
            )


def _derived_seed(seed: int, number: int) -> int:
    """The seed of an unseeded request: its own for every number, and reproducible."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xD1342543DE82EF95) % 2**63


def _no_text(_: int) -> None:
    return None
