"""Sampling state of every slot, and the draw of a step's tokens from its logits."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncengine._fast.cpu import Buffer, HeadDraws, Team, count_tokens, sample, sample_workspace

from ..wire.plan import ResultDetails, RowLogprobs, SlotInit

__all__ = ["NOT_FINITE", "HeadModes", "Sampler"]

Ints = NDArray[np.int32]

_RANDOM, _PENALTIES, _LOGPROBS, _MIN_LEN = 1, 2, 4, 8
NOT_FINITE = (
    "the model produced non-finite logits for this request;"
    " its weights may be damaged, or too large for the dtype"
)
_HEAD_MOST = 64
"""The most candidates that the head can keep of a row (AE_BEST)."""
_GREEDY = 1e-5
"""Temperatures below it take the largest logit (AE_GREEDY)."""


class HeadModes(NamedTuple):
    """What a step's head (AE_HEAD) is to keep of each sampled row: room for the most rows of a step."""

    k: Ints
    """The row's best k; -1: its logits."""
    temperature: NDArray[np.float32]
    """By what the logits are divided before they are compared."""


class Sampler:
    """Parameters by slot. Everything of a slot is overwritten when the next sequence enters it."""

    def __init__(self, team: Team, slots: int, vocab_size: int) -> None:
        self._team = team
        self._vocab_size = vocab_size
        self._workspace = Buffer(sample_workspace(team.num_threads, vocab_size))
        self._traits = np.zeros(slots, np.uint8)
        self._head_k = np.ones(slots, np.int32)
        self._head_temperature = np.ones(slots, np.float32)
        self._draws: dict[str, NDArray[Any]] = {
            "temperature": np.zeros(slots, np.float32),
            "top_k": np.zeros(slots, np.int32),
            "top_p": np.ones(slots, np.float32),
            "min_p": np.zeros(slots, np.float32),
            "seed": np.zeros(slots, np.uint64),
        }
        self._whole_below = np.zeros(slots, np.int32)
        """Positions below it need all logits of the slot's rows: its stop ids are banned there."""
        self._head = HeadDraws(
            team,
            vocab_size,
            self._workspace.address,
            head_k=self._head_k.data,
            head_temperature=self._head_temperature.data,
            whole_below=self._whole_below.data,
            **{name: values.data for name, values in self._draws.items()},
        )
        self._penalties: dict[str, NDArray[Any]] = {
            "presence": np.zeros(slots, np.float32),
            "frequency": np.zeros(slots, np.float32),
            "repetition": np.ones(slots, np.float32),
            # Addresses, 0 where the slot has no penalties and so no history.
            "counts": np.zeros(slots, np.uint64),
            "prompt_mask": np.zeros(slots, np.uint64),
        }
        self._num_logprobs = np.full(slots, -1, np.int32)
        self._stop_ids: list[Ints] = [np.zeros(0, np.int32)] * slots
        self._history: dict[int, _History] = {}

    def enter(self, init: SlotInit) -> None:
        """A sequence takes a slot; nothing of the slot's last sequence remains."""
        slot = init.slot
        penalties = (init.presence_penalty, init.frequency_penalty, init.repetition_penalty)
        penalized = penalties != (0.0, 0.0, 1.0)
        self._traits[slot] = (
            _RANDOM * (init.temperature > 0)
            | _PENALTIES * penalized
            | _LOGPROBS * (init.logprobs >= 0)
            | _MIN_LEN * (bool(init.stop_ids) and init.min_len > init.prompt_len)
        )
        is_greedy = init.temperature < _GREEDY
        best = 1 if is_greedy else init.top_k
        reducible = 1 <= best <= _HEAD_MOST and not self._traits[slot] & (_PENALTIES | _LOGPROBS)
        self._head_k[slot] = best if reducible else -1
        self._head_temperature[slot] = 1.0 if is_greedy else init.temperature
        draws = (init.temperature, init.top_k, init.top_p, init.min_p, init.seed)
        for array, value in zip(self._draws.values(), draws, strict=True):
            array[slot] = value
        self._num_logprobs[slot] = init.logprobs
        self._whole_below[slot] = init.min_len if self._traits[slot] & _MIN_LEN else 0
        self._stop_ids[slot] = np.array(init.stop_ids, np.int32)
        self._history.pop(slot, None)
        addresses = (0, 0)
        if penalized:
            if init.history is None:
                raise ValueError(f"slot {slot} has penalties but no history")
            self._history[slot] = history = _History(init.history, init.prompt_len, self._vocab_size)
            addresses = (history.counts.ctypes.data, history.in_prompt.ctypes.data)
        for array, value in zip(self._penalties.values(), (*penalties, *addresses), strict=True):
            array[slot] = value

    def head_modes(self, slots: Ints, positions: Ints, modes: HeadModes) -> None:
        """Writes what must be kept of the rows that `draw` will be called for with the same arguments.

        Greedy rows need one candidate, rows with top-k as many as that; penalties, log-probabilities, stop
        ids that are banned yet, and distributions that top-k does not bound need all logits.
        """
        self._head.modes(slots, positions, modes.k, modes.temperature)

    def draw(
        self,
        logits: int,
        slots: Ints,
        positions: Ints,
        tokens: Ints,
        *,
        best: int = 0,
        best_k: Ints | None = None,
    ) -> ResultDetails | None:
        """Draws a token for every row of `logits` (address of float32 [S, vocabulary]) into `tokens` [S].

        `positions` [S] are those of the drawn tokens; a slot may have several rows. -1 marks a row that
        failed; the details tell why, and carry log-probabilities where they were asked for. None where there
        is nothing to tell. After a step whose head kept the best of rows, `best` is the address of what it
        kept and `best_k` the `k` of the head modes.
        """
        rows = len(slots)
        if best_k is not None:
            failed = self._head.draw(best, best_k, slots, positions, tokens)
            if failed == 0:
                return None
            if failed > 0:
                return ResultDetails({}, _failures(tokens))
        traits = int(np.bitwise_or.reduce(self._traits[slots])) if rows else 0
        options: dict[str, NDArray[Any]] = {}
        if best_k is not None:
            options["head_k"] = best_k
        if traits & _RANDOM:
            options |= {name: values[slots] for name, values in self._draws.items()}
            options["position"] = positions.astype(np.int64)
        if traits & _PENALTIES:
            options |= {name: values[slots] for name, values in self._penalties.items()}
        if traits & _MIN_LEN:
            options["banned_start"], options["banned"] = self._banned(slots, positions)
        if traits & _LOGPROBS:
            options["num_logprobs"] = wanted = self._num_logprobs[slots]
            width = max(0, int(wanted.max()))
            options["logprob"] = np.empty(rows, np.float32)
            options["rank"] = np.empty(rows, np.int32)
            options["top_ids"] = np.empty((rows, width), np.int32)
            options["top_logprobs"] = np.empty((rows, width), np.float32)
        views = {name: array.data for name, array in options.items()}
        memory = self._workspace.address
        sample(self._team, logits, self._vocab_size, tokens.data, best=best, workspace=memory, **views)
        if traits & _PENALTIES:
            count_tokens(options["counts"].data, tokens.data, self._vocab_size)
        failures = _failures(tokens)
        if not (traits & _LOGPROBS or failures):
            return None
        return ResultDetails(self._logprobs_of(options, tokens < 0) if traits & _LOGPROBS else {}, failures)

    def _banned(self, slots: Ints, positions: Ints) -> tuple[Ints, Ints]:
        """Stop ids that cannot be drawn yet: rows' starts [S + 1] in the list of ids."""
        none = np.zeros(0, np.int32)
        early = (positions < self._whole_below[slots]).tolist()
        ids = [
            self._stop_ids[slot] if row_is_early else none
            for slot, row_is_early in zip(slots.tolist(), early, strict=True)
        ]
        starts = np.zeros(len(ids) + 1, np.int32)
        np.cumsum([len(row) for row in ids], out=starts[1:])
        return starts, np.concatenate(ids)

    @staticmethod
    def _logprobs_of(options: dict[str, NDArray[Any]], failed: NDArray[np.bool_]) -> dict[int, RowLogprobs]:
        wanted = options["num_logprobs"].tolist()
        return {
            row: RowLogprobs(
                float(options["logprob"][row]),
                int(options["rank"][row]),
                options["top_ids"][row, : wanted[row]].tolist(),
                options["top_logprobs"][row, : wanted[row]].tolist(),
            )
            for row in np.flatnonzero((options["num_logprobs"] >= 0) & ~failed).tolist()
        }


def _failures(tokens: Ints) -> dict[int, str]:
    return dict.fromkeys(np.flatnonzero(tokens < 0).tolist(), NOT_FINITE)


class _History:
    """What penalties count: how often each token was generated, and which ones the prompt has."""

    def __init__(self, tokens: list[int], prompt_len: int, vocab_size: int) -> None:
        # After a preemption the history holds generated tokens too: they count as such.
        self.counts = np.bincount(tokens[prompt_len:], minlength=vocab_size).astype(np.int32)
        self.in_prompt = np.zeros(vocab_size, np.uint8)
        self.in_prompt[tokens[:prompt_len]] = 1
