"""Many requests awaited together."""

import asyncio
from collections.abc import Callable

from ..errors import QueueFullError
from ..outputs import RequestOutput
from .stream import GenerationStream

__all__ = ["gather"]


async def gather(
    submit: Callable[[int], GenerationStream], count: int, *, use_tqdm: bool
) -> list[RequestOutput]:
    """Submits requests 0 to `count` and awaits them all; waits for room where the queue is full."""
    from tqdm import tqdm  # arrives with huggingface_hub

    outputs: dict[asyncio.Task[RequestOutput], int] = {}
    pending: set[asyncio.Task[RequestOutput]] = set()

    async def result(stream: GenerationStream) -> RequestOutput:
        return await stream

    # disable=None: no bar unless standard error is a terminal.
    with tqdm(total=count, desc="requests", disable=None if use_tqdm else True) as bar:
        try:
            for index in range(count):
                while True:
                    try:
                        stream = submit(index)
                        break
                    except QueueFullError:
                        if not pending:
                            raise
                        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                        bar.update(_check(done))
                task = asyncio.ensure_future(result(stream))
                outputs[task] = index
                pending.add(task)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                bar.update(_check(done))
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
    return [task.result() for task in outputs]


def _check(done: set[asyncio.Task[RequestOutput]]) -> int:
    for task in done:
        task.result()
    return len(done)
