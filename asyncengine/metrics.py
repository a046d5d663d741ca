"""Plain counters and histograms, updated by the engine loop and read as one snapshot.

Names follow vLLM's suffixes, so that dashboards carry over; times are in seconds.
"""

from bisect import bisect_left

import msgspec

__all__ = ["EngineMetrics", "Histogram", "HistogramSnapshot"]

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip


class HistogramSnapshot(msgspec.Struct, frozen=True):
    """`buckets[i]` counts what is at most `bounds[i]` and above the bound before; the last has no bound."""

    bounds: tuple[float, ...]
    buckets: tuple[int, ...]
    count: int
    sum: float


class Histogram:
    """Counts of observations in fixed buckets."""

    __slots__ = ("bounds", "buckets", "count", "sum")

    def __init__(self, bounds: tuple[float, ...] = _SECONDS) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.count += 1
        self.sum += value

    def snapshot(self) -> HistogramSnapshot:
        return HistogramSnapshot(self.bounds, tuple(self.buckets), self.count, self.sum)


class EngineMetrics:
    """What one engine has counted since it was created."""

    def __init__(self) -> None:
        self.steps = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = {}
        self.step_device_seconds = Histogram()
        self.time_to_first_token = Histogram()
        self.queue_time = Histogram()
        self.e2e_latency = Histogram()

    def snapshot(self) -> dict[str, int | float | HistogramSnapshot]:
        values: dict[str, int | float | HistogramSnapshot] = {
            "steps_total": self.steps,
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generation_tokens,
            "step_device_seconds": self.step_device_seconds.snapshot(),
            "time_to_first_token_seconds": self.time_to_first_token.snapshot(),
            "request_queue_time_seconds": self.queue_time.snapshot(),
            "e2e_request_latency_seconds": self.e2e_latency.snapshot(),
        }
        for reason in ("stop", "length", "cancelled", "timeout", "error"):
            values[f"requests_finished_total{{finish_reason={reason}}}"] = self.finished.get(reason, 0)
        return values
