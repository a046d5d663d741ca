"""A request in flight: its completions as they grow, and who waits for them.

Tokens live in the scheduler's tables; a completion reads them when somebody wants them. So a slow
consumer costs nothing, gets what came meanwhile in one delta, and never holds up the batch. Only
completions with stop strings turn tokens into text at every step, since the text decides when to end.
"""

import asyncio
import time
from collections.abc import Callable

from ..outputs import CompletionOutput, Delta, FinishReason, Logprob, RequestMetrics, RequestOutput
from ..params import SamplingParams
from ..scheduling.scheduler import Scheduler
from ..scheduling.sequence import Sequence
from ..text.detokenizer import Detokenizer
from ..text.stop_strings import StopChecker
from ..wire.plan import RowLogprobs

__all__ = ["Completion", "Request"]


class Completion:
    """One of a request's `n` outputs: reads its sequence's tokens into text and deltas."""

    __slots__ = (
        "_decode",
        "_logprobs",
        "_scheduler",
        "_sent_ids",
        "_sent_text",
        "detokenizer",
        "output",
        "sequence",
        "stops",
    )

    def __init__(self, index: int, params: SamplingParams, decode_token: Callable[[int], str | None]) -> None:
        self.sequence: Sequence | None = None
        """None until the prompt is tokenized."""
        self._scheduler: Scheduler | None = None
        self.detokenizer: Detokenizer | None = None
        """None until then too, and where no text is wanted."""
        self.output = CompletionOutput(index)
        self.stops = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._decode = decode_token
        self._logprobs: list[RowLogprobs] | None = None
        if params.logprobs is not None:
            self._logprobs = []
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0
        self._sent_ids = 0
        self._sent_text = 0

    def attach(self, sequence: Sequence, scheduler: Scheduler) -> None:
        """From now on the tokens of `sequence` are this completion's."""
        self.sequence = sequence
        self._scheduler = scheduler

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def add_logprobs(self, row: RowLogprobs) -> None:
        """Takes the distribution that belongs to the next token of the sequence."""
        if self._logprobs is not None:
            self._logprobs.append(row)

    def absorb(self) -> bool:
        """Reads the tokens that came since the last call; True if they complete a stop string.

        Tokens after the one that completed it are dropped, its text is cut where the string starts.
        """
        output = self.output
        if output.finish_reason is not None or self.sequence is None or self._scheduler is None:
            return False
        ids = self._scheduler.generated(self.sequence, len(output.token_ids))
        if not ids:
            return False
        if self.stops is None:
            output.token_ids.extend(ids)
            if self.detokenizer is not None:
                output.text += self.detokenizer.push(ids)
        elif self.detokenizer is not None:
            for token in ids:
                output.token_ids.append(token)
                text, stop = self.stops.push(self.detokenizer.push((token,)))
                output.text += text
                if stop is not None:
                    output.stop_reason = stop
                    break
        self._absorb_logprobs()
        return output.stop_reason is not None

    def _absorb_logprobs(self) -> None:
        output = self.output
        if self._logprobs is None or output.logprobs is None or output.cumulative_logprob is None:
            return
        for token in output.token_ids[len(output.logprobs) :]:
            row = self._logprobs[len(output.logprobs)]
            entry = {token: Logprob(row.sampled, row.rank, self._decode(token))}
            for rank, (other, value) in enumerate(zip(row.top_ids, row.top_logprobs, strict=True), 1):
                entry.setdefault(other, Logprob(value, rank, self._decode(other)))
            output.logprobs.append(entry)
            output.cumulative_logprob += row.sampled

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """Ends the completion: reads what is left, flushes held-back text."""
        output = self.output
        if output.finish_reason is not None:
            return
        hit = output.stop_reason is not None or self.absorb()
        if not hit and self.detokenizer is not None:
            text = self.detokenizer.finish()
            if self.stops is not None:
                text, stop = self.stops.finish(text)
                if stop is not None:
                    output.stop_reason, hit = stop, True
            output.text += text
        if not hit:
            output.stop_reason = stop_reason
        output.finish_reason = "stop" if hit else reason

    def take(self) -> Delta | None:
        """What came since the last delta, or None."""
        output = self.output
        if output.finish_reason is None:
            if self.stops is None:
                self.absorb()
            if len(output.token_ids) == self._sent_ids:
                return None
        elif self._sent_ids < 0:
            return None
        delta = Delta(
            output.index,
            output.text[self._sent_text :],
            output.token_ids[self._sent_ids :],
            None if output.logprobs is None else output.logprobs[self._sent_ids :],
            output.finish_reason,
            output.stop_reason if output.finish_reason is not None else None,
        )
        self._sent_text = len(output.text)
        self._sent_ids = len(output.token_ids) if output.finish_reason is None else -1
        return delta


class Request:
    """What the engine keeps of one `generate` call until every completion has ended."""

    __slots__ = (
        "_finals",
        "_reader",
        "_start",
        "completions",
        "error",
        "id",
        "metrics",
        "number",
        "params",
        "prompt",
        "prompt_token_ids",
        "timer",
    )

    def __init__(
        self,
        request_id: str,
        number: int,
        prompt: str | None,
        params: SamplingParams,
        decode_token: Callable[[int], str | None],
    ) -> None:
        self.id = request_id
        self.number = number
        """Of its arrival at this engine, from 1."""
        self.prompt = prompt
        self.prompt_token_ids: list[int] = []
        self.params = params
        self.completions = [Completion(index, params, decode_token) for index in range(params.n)]
        self.error: BaseException | None = None
        self.metrics = RequestMetrics(time.time())
        self.timer: asyncio.TimerHandle | None = None
        self._start = time.perf_counter()
        self._reader: asyncio.Future[None] | None = None
        self._finals: list[asyncio.Future[None]] = []

    @property
    def age(self) -> float:
        """Seconds since arrival."""
        return time.perf_counter() - self._start

    @property
    def finished(self) -> bool:
        return all(completion.output.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        """The request as it stands."""
        for completion in self.completions:
            if completion.stops is None:
                completion.absorb()
        first = self.completions[0].sequence
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.output for completion in self.completions],
            finished=self.finished,
            num_cached_tokens=first.num_cached_tokens if first is not None else 0,
            metrics=self.metrics,
        )

    def take(self) -> Delta | None:
        """The next delta of any completion, or None if nothing has come."""
        for completion in self.completions:
            delta = completion.take()
            if delta is not None:
                return delta
        return None

    # Waiting. One task reads deltas, any number waits for the end.

    async def wait_delta(self) -> None:
        """Returns once there may be a delta, or the request has ended."""
        if self._reader is not None:
            raise RuntimeError(f"stream {self.id!r} is already being read by another task")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    async def wait_finished(self) -> None:
        while not self.finished:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._finals.append(future)
            try:
                await future
            finally:
                self._finals.remove(future)

    def wake(self) -> None:
        """Tells the reader that something came."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def settle(self) -> None:
        """Called once, when the request has ended in any way: tells everybody who waits."""
        self.metrics.total = self.age
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.wake()
        for future in self._finals:
            if not future.done():
                future.set_result(None)

    def raise_error(self) -> None:
        """Raises what the request failed with, if it did."""
        if self.error is not None:
            # A fresh one for every waiter: a raised exception carries that waiter's traceback.
            raise type(self.error)(*self.error.args) from self.error.__cause__
