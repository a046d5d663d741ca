"""`AsyncLLM`: the engine as its users see it."""

import asyncio
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, NoReturn

from .args import EngineArgs
from .config import EngineConfig
from .engine.boot import ProgressEvent, Started, StartupReport, start
from .engine.core import EngineCore
from .engine.door import Door, Prompt
from .engine.gather import gather
from .engine.request import Request
from .engine.stream import GenerationStream
from .errors import AsyncEngineError, EngineClosedError, InvalidRequestError
from .metrics import HistogramSnapshot
from .outputs import RequestOutput
from .params import SamplingParams
from .text.chat_template import ChatTemplate
from .text.messages import check_variables
from .text.tokenizer import INLINE_CHARACTERS, Tokenizer

__all__ = ["AsyncLLM"]

Messages = list[dict[str, Any]]


class AsyncLLM:
    """An LLM in this process's event loop; its device work runs in worker processes.

    Made by `await AsyncLLM.create(model)`. Belongs to the loop it was created on. Close it with
    `await llm.aclose()`, or use `async with await AsyncLLM.create(...) as llm`.
    """

    def __init__(self, started: Started) -> None:
        """Not for callers: use `AsyncLLM.create`."""
        self._core: EngineCore = started.core
        self._undo: AsyncExitStack = started.undo
        self._door = Door(
            started.config, started.spec, started.text.tokenizer, started.text.sampling_defaults
        )
        self._tokenizer = started.text.tokenizer
        self._chat_template = started.text.chat_template
        self._config = started.config
        self._startup = started.report
        self._admissions: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def create(
        cls,
        model: str | os.PathLike[str],
        *,
        on_progress: Callable[[ProgressEvent], None] | None = None,
        **engine_args: Any,
    ) -> "AsyncLLM":
        """Starts an engine for `model`: a Hub id, a local directory or a `.gguf` file.

        `on_progress` is called on this loop as the stages (config, load, profile, allocate, capture)
        proceed. `engine_args` are the fields of `EngineArgs`. Raises `ConfigError`, `ModelLoadError` or
        `OutOfMemoryError`, with everything undone that was begun.
        """
        args = EngineArgs.from_fields(model, engine_args)
        return cls(await start(args, on_progress))

    # What it is

    @property
    def config(self) -> EngineConfig:
        """What the engine runs with, every default settled."""
        return self._config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None with `skip_tokenizer_init=True`."""
        return self._tokenizer

    @property
    def startup(self) -> StartupReport:
        """Seconds and bytes of every stage of the start."""
        return self._startup

    @property
    def is_healthy(self) -> bool:
        """Whether the engine is open and its workers live, be it asleep or not."""
        return self._core.error is None

    @property
    def is_sleeping(self) -> bool:
        """Whether requests are refused until `wake_up`."""
        return self._core.sleep_level > 0

    def metrics(self) -> dict[str, int | float | HistogramSnapshot]:
        """A snapshot of counters, gauges and histograms by name; times in seconds."""
        scheduler = self._core.scheduler
        return {
            "num_requests_running": scheduler.num_running,
            "num_requests_waiting": scheduler.num_waiting,
            "kv_cache_usage_perc": 1.0 - scheduler.num_free_blocks / scheduler.num_blocks,
            "num_preemptions_total": scheduler.num_preemptions,
            "prefix_cache_queries_total": scheduler.prefix_query_tokens,
            "prefix_cache_hits_total": scheduler.prefix_hit_tokens,
            "spec_decode_num_drafts_total": scheduler.num_drafts,
            "spec_decode_num_draft_tokens_total": scheduler.num_draft_tokens,
            "spec_decode_num_accepted_tokens_total": scheduler.num_accepted_tokens,
            **self._core.metrics.snapshot(),
        }

    # Requests

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        lora: None = None,
        **sampling_fields: Any,
    ) -> GenerationStream:
        """Submits a request at once and returns its stream.

        prompt: text, or token ids. `priority`: smaller is sooner (needs scheduling_policy="priority").
        `timeout`: seconds from now to the end. `cache_salt`: prefixes are shared only under equal salts.
        `sampling_fields` are fields of `SamplingParams` and override `sampling_params`.

        Raises `InvalidRequestError` and `QueueFullError` before anything is queued; for long texts, which
        are tokenized in a thread, to whoever iterates or awaits the stream.
        """
        return self._submit(
            prompt,
            lambda: self._door.tokenize(prompt),
            isinstance(prompt, str) and len(prompt) > INLINE_CHARACTERS,
            self._params(sampling_params, sampling_fields),
            request_id,
            priority,
            timeout,
            cache_salt,
            lora,
        )

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        lora: None = None,
        **sampling_fields: Any,
    ) -> GenerationStream:
        """As `generate`, for OpenAI-style messages, rendered by the model's chat template or the caller's."""
        template = self._template(chat_template)
        variables = check_variables(chat_template_kwargs or {})

        def render() -> str:
            return template.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )

        # The caller's own template may loop for long, and belongs off the loop whatever its input.
        deferred = chat_template is not None
        text = None if deferred else render()

        def tokenize() -> list[int]:
            # The template has written the special tokens.
            return self._door.tokenize(render() if text is None else text, add_special_tokens=False)

        return self._submit(
            text,
            tokenize,
            text is None or len(text) > INLINE_CHARACTERS,
            self._params(sampling_params, sampling_fields),
            request_id,
            priority,
            timeout,
            cache_salt,
            lora,
        )

    async def generate_many(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        **sampling_fields: Any,
    ) -> list[RequestOutput]:
        """Runs many prompts and returns their outputs in order.

        `sampling_params`: one for all, or one per prompt. Where the engine's queue is bounded, waits for
        room. The first error cancels the rest and is raised.
        """
        params = _one_each(sampling_params, len(prompts))

        def submit(index: int) -> GenerationStream:
            return self.generate(
                prompts[index],
                params[index],
                priority=priority,
                timeout=timeout,
                cache_salt=cache_salt,
                **sampling_fields,
            )

        return await gather(submit, len(prompts), use_tqdm=use_tqdm)

    def cancel(self, request_id: str) -> bool:
        """Cancels a request by its id; False if no request of that id is in flight."""
        request = self._core.requests.get(request_id)
        if request is None:
            return False
        if threading.get_ident() == self._core.thread_id:
            self._core.cancel(request)
        else:
            self._core.cancel_soon(request)
        return True

    def _params(self, params: SamplingParams | None, fields: Mapping[str, Any]) -> SamplingParams:
        self._check_usable()
        return self._door.params(params, fields)

    def _submit(
        self,
        prompt: Any,
        tokenize: Callable[[], list[int]],
        in_thread: bool,
        params: SamplingParams,
        request_id: str | None,
        priority: int,
        timeout: float | None,
        cache_salt: str | None,
        lora: None,
    ) -> GenerationStream:
        core = self._core
        self._door.check_options(priority, timeout, cache_salt, lora)
        request = self._door.request(prompt, params, request_id, core.requests)

        def admit(ids: list[int]) -> None:
            core.admit(request, self._door.sequences(request, ids, priority=priority, cache_salt=cache_salt))

        if in_thread:
            core.open(request, timeout)
            task = core.loop.create_task(_admit_later(core, request, tokenize, admit))
            self._admissions.add(task)
            task.add_done_callback(self._admissions.discard)
        else:
            admit(tokenize())
            core.open(request, timeout)
        return GenerationStream(core, request)

    def _template(self, source: str | None) -> ChatTemplate:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                "chat needs a tokenizer, and the engine was created with skip_tokenizer_init=True",
                parameter="messages",
            )
        if source is not None:
            return ChatTemplate.for_tokenizer(tokenizer, source)
        if self._chat_template is None:
            raise InvalidRequestError(
                "the model has no chat template; pass chat_template=, or use generate",
                parameter="chat_template",
            )
        return self._chat_template

    def _check_usable(self) -> None:
        self._check_open()
        if self._core.sleep_level:
            raise EngineClosedError("the engine sleeps; await wake_up() first")

    def _check_open(self) -> None:
        core = self._core
        if core.error is not None:
            raise type(core.error)(*core.error.args)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is not core.loop:
            raise EngineClosedError(
                "the engine belongs to the event loop it was created on; create one engine per loop, or use "
                "asyncio.run_coroutine_threadsafe with that loop"
                if loop is not None
                else "a request needs a running event loop; call this inside a coroutine, or use LLM"
            )

    # The engine as a whole

    async def reset_prefix_cache(self) -> None:
        """Nothing computed before now is reused by requests that start from now on."""
        self._check_usable()
        self._core.scheduler.reset_prefix_cache()

    async def sleep(self, level: int = 1) -> None:
        """Gives memory back while the engine is not needed; processes stay.

        New requests are refused with `EngineClosedError` from now on, and those in flight are awaited first.
        Level 1 gives back the KV cache and, on a GPU, the weights, which move to host memory. Level 2 gives
        back the weights too, which `wake_up` loads anew from the model's files. What the prefix cache knew
        is forgotten. Raises `OutOfMemoryError`, and stays awake, where host memory has no room for a GPU's
        weights.
        """
        if isinstance(level, bool) or level not in (1, 2):
            raise InvalidRequestError(f"level={level!r} must be 1 or 2", parameter="level", value=level)
        self._check_open()
        await self._core.sleep(level)

    async def wake_up(self) -> None:
        """Takes the memory again and serves on. Does nothing to an engine that is awake.

        Raises `OutOfMemoryError` where others have taken the memory meanwhile; the engine then sleeps on, and
        this may be tried again.
        """
        self._check_open()
        await self._core.wake_up()

    async def drain(self) -> None:
        """Returns once no request is queued or running; new ones are still taken."""
        await self._core.wait_idle()

    async def aclose(self, *, drain: bool = False) -> None:
        """Ends the engine and gives all memory and processes back. Idempotent.

        Requests in flight are first awaited with `drain=True`; otherwise they fail with
        `EngineClosedError`.
        """
        if drain and self._core.error is None:
            await self._core.wait_idle()
        if self._closing is None:
            self._core.close()
            self._closing = asyncio.ensure_future(self._undo.aclose())
        await asyncio.shield(self._closing)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if getattr(self, "_closing", True) is None:
            self._core.workers.kill()
            warnings.warn(f"{self!r} was not closed; await aclose()", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        state = "open" if self.is_healthy else "closed"
        return f"<AsyncLLM {self._config.model!r} {state}>"

    # Not served yet

    async def embed(self, inputs: Any, pooling_params: Any = None) -> NoReturn:
        _unserved("embed")

    async def classify(self, inputs: Any) -> NoReturn:
        _unserved("classify")

    async def score(self, a: Any, b: Any) -> NoReturn:
        _unserved("score")


async def _admit_later(
    core: EngineCore, request: Request, tokenize: Callable[[], list[int]], admit: Callable[[list[int]], None]
) -> None:
    try:
        ids = await asyncio.to_thread(tokenize)
        if not request.finished:
            admit(ids)
    except BaseException as error:
        core.fail(request, error)
        if not isinstance(error, AsyncEngineError):
            raise


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"there are {count} prompts but {len(params)} sampling_params; pass one for all or one each",
            parameter="sampling_params",
            value=len(params),
        )
    return params


def _unserved(name: str, instead: str = "only text generation is served") -> NoReturn:
    raise InvalidRequestError(f"{name} is not supported in this version; {instead}", parameter=name)


logging.getLogger("asyncengine").addHandler(logging.NullHandler())
