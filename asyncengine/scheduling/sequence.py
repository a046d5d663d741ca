"""A sequence: one of the `n` continuations of a request, as the scheduler sees it."""

import enum
from array import array
from collections.abc import Iterable
from typing import Any

from ..errors import InvalidRequestError
from ..outputs import FinishReason
from ..params import SamplingParams
from ..wire.plan import SlotInit

__all__ = ["Sequence", "State", "noise_key"]

_MASK = 2**64 - 1


class State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


def noise_key(seed: int, index: int) -> int:
    """The 64-bit key of the noise of continuation `index` under `seed`: splitmix64's output function
    (Steele, Lea and Flood, 2014) at that place of its stream, so that neighbours are unrelated."""
    z = (seed + 0x9E3779B97F4A7C15 * (index + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Sequence:
    """Made by the engine, handed to `Scheduler.add`, and from then on changed by the scheduler only.

    `owner` is the engine's own; the scheduler never looks into it. Siblings should be given one and the
    same `prompt` array. Raises `InvalidRequestError` for ids that are not 32-bit.
    """

    __slots__ = (
        "arrival",
        "cache_salt",
        "chain",
        "children",
        "error",
        "finish_reason",
        "index",
        "max_len",
        "noise",
        "num_cached_tokens",
        "owner",
        "params",
        "parent",
        "priority",
        "prompt_len",
        "queued",
        "rank",
        "request_id",
        "slot",
        "started",
        "state",
        "stop_ids",
        "stop_reason",
        "tokens",
    )

    def __init__(
        self,
        request_id: str,
        prompt: "Iterable[int]",
        params: SamplingParams,
        *,
        seed: int,
        arrival: float,
        index: int = 0,
        priority: int = 0,
        cache_salt: bytes = b"",
        owner: Any = None,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.arrival = arrival
        """In seconds, on any clock that all sequences share."""
        self.index = index
        self.priority = priority
        self.cache_salt = cache_salt
        """Prefixes are shared only under equal salts."""
        self.owner = owner
        self.noise = noise_key(seed, index)

        self.tokens: array[int] = _int32(prompt, "prompt")
        """All known tokens, prompt first; while the sequence runs, those at its admission."""
        self.prompt_len = len(self.tokens)
        self.stop_ids = _int32(params.stop_token_ids, "stop_token_ids")

        self.state = State.WAITING
        self.slot = -1
        """-1 unless it runs."""
        self.started = False
        """Whether it was ever admitted."""
        self.num_cached_tokens = 0
        """Tokens of the prompt whose keys and values were there at the first admission."""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        """Why it failed, where `finish_reason` is "error"."""

        # The scheduler's own.
        self.max_len = 0
        self.rank: tuple[float, int] = (arrival, 0)
        self.queued = False
        self.chain = b""
        self.parent: Sequence | None = None
        self.children: list[Sequence] = []

    def __repr__(self) -> str:
        return f"<Sequence {self.request_id}[{self.index}] {self.state.value}, slot {self.slot}>"

    @property
    def min_len(self) -> int:
        """Length, prompt included, below which a stop token cannot be drawn."""
        return self.prompt_len + self.params.min_tokens

    @property
    def penalized(self) -> bool:
        """Whether what was drawn before changes what is drawn next."""
        p = self.params
        return p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1

    def slot_init(self, slot: int, eos_ids: Iterable[int]) -> SlotInit:
        """What the worker must know when the sequence enters `slot`."""
        p = self.params
        return SlotInit(
            slot=slot,
            seed=self.noise,
            prompt_len=self.prompt_len,
            temperature=float(p.temperature),
            top_k=max(p.top_k, 0),
            top_p=float(p.top_p),
            min_p=float(p.min_p),
            presence_penalty=float(p.presence_penalty),
            frequency_penalty=float(p.frequency_penalty),
            repetition_penalty=float(p.repetition_penalty),
            logprobs=-1 if p.logprobs is None else p.logprobs,
            min_len=self.min_len,
            stop_ids=[*self.stop_ids, *(() if p.ignore_eos else eos_ids)],
            history=self.tokens.tolist() if self.penalized else None,
        )


def _int32(ids: Iterable[int], name: str) -> "array[int]":
    if isinstance(ids, array) and ids.typecode == "i":
        return ids
    try:
        return array("i", ids)
    except (OverflowError, TypeError) as e:
        raise InvalidRequestError(f"{name} must hold 32-bit token ids: {e}", parameter=name) from None
