"""What a request gives back. Plain values: nothing here refers to the engine."""

from typing import Literal, NamedTuple

import msgspec

__all__ = [
    "CompletionOutput",
    "Delta",
    "FinishReason",
    "Logprob",
    "Logprobs",
    "RequestMetrics",
    "RequestOutput",
    "Usage",
]

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


class Logprob(NamedTuple):
    """One token's log-probability (natural log) in the raw model distribution at a position."""

    logprob: float
    rank: int
    """1 for the most likely token."""
    decoded_token: str | None


Logprobs = list[dict[int, Logprob]]
"""One dict per generated position: the sampled token first, then the most likely ones."""


class Delta(msgspec.Struct, frozen=True):
    """What came since the last delta of the same `index`.

    Joining the `text` (or `token_ids`) of all deltas of an index gives exactly the final text (ids).
    A consumer that is late gets several tokens in one delta.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class CompletionOutput(msgspec.Struct):
    """One of the `n` completions of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for EOS and every other ending."""


class RequestMetrics(msgspec.Struct):
    """Times of one request, in seconds. `arrival` is on `time.time()`'s clock, the rest are spans."""

    arrival: float
    queue: float | None = None
    """From arrival to the first step that computes the prompt."""
    prefill: float | None = None
    """From that step's plan to the first token."""
    first_token: float | None = None
    """From arrival to the first token."""
    total: float | None = None
    """From arrival to the end."""


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one request, all completions together."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class RequestOutput(msgspec.Struct):
    """A request's state: as it stands (`stream.output`) or final (`await stream`)."""

    request_id: str
    prompt: str | None
    """None where the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""
    metrics: RequestMetrics
    prompt_logprobs: Logprobs | None = None

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt_token_ids), sum(len(o.token_ids) for o in self.outputs))
