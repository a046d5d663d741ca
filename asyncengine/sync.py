"""`LLM`: the same engine for programs without an event loop. It runs on a loop in a thread of its own."""

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import uvloop

from .engine.gather import gather
from .errors import EngineClosedError, InvalidRequestError
from .llm import AsyncLLM, Messages
from .metrics import HistogramSnapshot
from .outputs import RequestOutput
from .params import SamplingParams

__all__ = ["LLM"]

T = TypeVar("T")


class LLM:
    """`LLM(model, **engine_args)`: blocking calls over `AsyncLLM`. Close it, or use `with`."""

    def __init__(self, model: str, **engine_args: Any) -> None:
        self._loop = uvloop.new_event_loop()
        thread = threading.Thread(target=_run, args=(self._loop,), name="asyncengine", daemon=True)
        thread.start()
        self._thread = thread
        try:
            self._llm = self._call(AsyncLLM.create(model, **engine_args))
        except BaseException:
            _stop(self._loop, thread)
            raise
        # Also at interpreter exit, while threads still run.
        self._finalizer = weakref.finalize(self, _close, self._llm, self._loop, thread)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Outputs in the order of `prompts`: one prompt or a list; each a text, token ids, or a dict with
        `prompt` or `prompt_token_ids`. `options` as in `AsyncLLM.generate`."""
        many = [_prompt(prompt) for prompt in _listed(prompts)]
        return self._call(self._llm.generate_many(many, sampling_params, use_tqdm=use_tqdm, **options))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Outputs for one conversation or a list of them. `options` as in `AsyncLLM.chat`."""
        many: list[Any] = list(messages)
        if not many or isinstance(many[0], Mapping):
            many = [many]

        async def run() -> list[RequestOutput]:
            return await gather(
                lambda index: self._llm.chat(many[index], sampling_params, **options),
                len(many),
                use_tqdm=use_tqdm,
            )

        return self._call(run())

    def get_metrics(self) -> dict[str, int | float | HistogramSnapshot]:
        """As `AsyncLLM.metrics`."""

        async def read() -> dict[str, int | float | HistogramSnapshot]:
            return self._llm.metrics()

        return self._call(read())

    def reset_prefix_cache(self) -> None:
        """As `AsyncLLM.reset_prefix_cache`."""
        self._call(self._llm.reset_prefix_cache())

    def embed(self, *args: Any, **options: Any) -> Any:
        """Not served in this version."""
        return self._call(self._llm.embed(args))

    def encode(self, *args: Any, **options: Any) -> Any:
        """Not served in this version."""
        return self._call(self._llm.embed(args))

    def classify(self, *args: Any, **options: Any) -> Any:
        """Not served in this version."""
        return self._call(self._llm.classify(args))

    def score(self, *args: Any, **options: Any) -> Any:
        """Not served in this version."""
        return self._call(self._llm.score(args, options))

    def sleep(self, level: int = 1) -> None:
        """As `AsyncLLM.sleep`."""
        self._call(self._llm.sleep(level))

    def wake_up(self, tags: list[str] | None = None) -> None:
        """As `AsyncLLM.wake_up`. Parts cannot be woken up one by one: `tags` must be None."""
        if tags is not None:
            raise InvalidRequestError(
                f"tags={tags!r} is not supported; leave it None, which wakes up everything",
                parameter="tags",
                value=tags,
            )
        self._call(self._llm.wake_up())

    @property
    def is_sleeping(self) -> bool:
        """As `AsyncLLM.is_sleeping`."""
        return self._llm.is_sleeping

    def close(self) -> None:
        """Ends the engine. Idempotent."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise EngineClosedError("the engine was closed")
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("LLM blocks, and this is its own event loop; use AsyncLLM in coroutines")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _close(llm: AsyncLLM, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    asyncio.run_coroutine_threadsafe(llm.aclose(), loop).result()
    _stop(loop, thread)


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    async def shutdown() -> None:
        await loop.shutdown_default_executor()

    asyncio.run_coroutine_threadsafe(shutdown(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(
            "prompts must be a prompt or a list of prompts", parameter="prompts", value=prompts
        )
    if prompts and all(isinstance(token, int) for token in prompts):
        return [prompts]
    return list(prompts)


def _prompt(prompt: Any) -> Any:
    if not isinstance(prompt, Mapping):
        return prompt
    unknown = set(prompt) - {"prompt", "prompt_token_ids"}
    if unknown or not prompt:
        raise InvalidRequestError(
            f"a prompt given as a dict has prompt or prompt_token_ids; {sorted(unknown)} is not supported",
            parameter="prompts",
            value=prompt,
        )
    return prompt.get("prompt_token_ids") or prompt["prompt"]
