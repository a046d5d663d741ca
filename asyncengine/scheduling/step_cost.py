"""What a step costs, learned from the steps that ran: whether drafts and waiting for results pay."""

from array import array

from .._fast.slots import lines

__all__ = ["StepCost"]

_WEIGHT = 0.125
_OUTLIER = 2.0
"""A time counts as at most so many times what was expected: others use the machine too."""
_MEMORY = 256
"""Observations after which a size that was not seen again is forgotten, and so tried again."""
_FIRST_TIME = 10_000.0
_FIRST_GAP = 200.0
_FADING = 0.99


class StepCost:
    """Times of steps by the number of their tokens, and the pause before a step that was waited with.

    A step reads all weights once, whatever it computes, so that a few tokens more are nearly free; from
    some number on, each one costs. Where that is depends on the model, the machine and who else uses it,
    so it is measured: one moving average for each power of two of tokens, with straight lines between.
    Sizes beyond what is known are taken to cost no more: to try is to know. Only steps all of whose
    tokens were sampled from are shown to this class, for the head of the model costs too.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[float, float, int]] = {}
        """By bits of (tokens - 1): mean tokens, mean microseconds, number of the last observation."""
        self._seen = 0
        self._gap = _FIRST_GAP

    def observe(self, tokens: int, microseconds: float) -> None:
        """A step of that many tokens took so long on the device."""
        self._seen += 1
        size = (tokens - 1).bit_length()
        found = self._sizes.get(size)
        if found is None:
            self._sizes[size] = (tokens, microseconds, self._seen)
        else:
            mean, time, _ = found
            time += _WEIGHT * (min(microseconds, _OUTLIER * time) - time)
            self._sizes[size] = (mean + _WEIGHT * (tokens - mean), time, self._seen)
        if self._seen % _MEMORY == 0:
            self._sizes = {k: v for k, v in self._sizes.items() if self._seen - v[2] < _MEMORY}

    def observe_gap(self, microseconds: float) -> None:
        """The device idled so long before a step that was planned after the result it waited for."""
        self._gap += _WEIGHT * (max(microseconds, 0.0) - self._gap)

    def times(self, tokens: int, drafts: int) -> "array[float]":
        """Microseconds that steps of `tokens` take with 0 to `drafts` tokens more; never falling."""
        points = sorted(self._sizes.values()) or [(1.0, _FIRST_TIME, 0)]
        counts = array("d", [point[0] for point in points])
        return lines(counts, array("d", [point[1] for point in points]), tokens, drafts + 1)

    def worth_waiting(self, tokens: float, time: float, usual: float) -> bool:
        """Whether a step that gives `tokens` for each one of a step planned ahead, and takes `time`
        microseconds where that one takes `usual`, makes up for the device's idling before it.

        The estimate of the gap fades while nothing waits, so that it is measured again some time.
        """
        worth = tokens * usual > time + self._gap
        if not worth:
            self._gap *= _FADING
        return worth
