"""The command line: `asyncengine chat|generate|info`."""

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import uvloop

from ..checkpoint.demo import demo_model
from ..engine.boot import ProgressEvent
from ..errors import AsyncEngineError
from ..llm import AsyncLLM

__all__ = ["main"]

_ENGINE_OPTIONS: dict[str, Callable[[str], Any]] = {
    "tokenizer": str,
    "revision": str,
    "load_format": str,
    "dtype": str,
    "max_model_len": int,
    "kv_cache_memory_bytes": int,
    "tensor_parallel_size": int,
    "num_threads": int,
    "seed": int,
}
_SAMPLING_OPTIONS: dict[str, Callable[[str], Any]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "stop": str,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    args = _parser().parse_args(argv)
    _split_words(args)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            status: int = runner.run(args.run(args))
            return status
    except AsyncEngineError as error:
        print(f"asyncengine: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncengine", description="LLM inference inside your Python program."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, text in (
        ("chat", _chat, "answer PROMPT, or hold a conversation if there is none"),
        ("generate", _generate, "continue PROMPT"),
        ("info", _info, "load the model and say what the engine runs with"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text}. Without MODEL, the demo model SmolLM2-135M-Instruct. A single word that is "
            "an existing path or has the form owner/name is taken as MODEL, anything else as PROMPT.",
        )
        command.set_defaults(run=run)
        command.add_argument("words", nargs="*", metavar="[MODEL] [PROMPT]")
        command.add_argument("--model", help="Hub id, directory or .gguf file")
        engine = command.add_argument_group("engine")
        for option, kind in _ENGINE_OPTIONS.items():
            engine.add_argument(f"--{option.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)
        if name == "info":
            continue
        sampling = command.add_argument_group("sampling (greedy unless a temperature is given)")
        for option, kind in _SAMPLING_OPTIONS.items():
            sampling.add_argument(f"--{option.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)
        if name == "chat":
            command.add_argument("--system", help="system prompt")
    return parser


def _split_words(args: argparse.Namespace) -> None:
    words = list(args.words)
    if args.model is None and words and (len(words) > 1 or _is_model(words[0])):
        args.model = words.pop(0)
    args.prompt = " ".join(words) if words else None


def _is_model(word: str) -> bool:
    return (
        os.path.exists(word) or word.endswith(".gguf") or re.fullmatch(r"[\w.-]+/[\w.-]+", word) is not None
    )


def _chosen(args: argparse.Namespace, options: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in options if hasattr(args, name)}


async def _create(args: argparse.Namespace) -> AsyncLLM:
    show = sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    options = _chosen(args, _ENGINE_OPTIONS)
    if args.model is None:
        options.setdefault("dtype", "bfloat16")  # so small a model answers better without rounded activations
    return await AsyncLLM.create(
        args.model or demo_model(), on_progress=_show_progress if show else None, **options
    )


def _show_progress(event: ProgressEvent) -> None:
    share = f"{100 * event.done // event.total:3d}%" if event.total else ""
    end = "\r\x1b[K" if event.stage == "capture" and event.done >= event.total else ""
    print(f"\r\x1b[K{event.stage} {share} {event.message}{end}", end="", file=sys.stderr, flush=True)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {"temperature": 0.0, **_chosen(args, _SAMPLING_OPTIONS)}


async def _chat(args: argparse.Namespace) -> int:
    messages = [{"role": "system", "content": args.system}] if args.system else []
    async with await _create(args) as llm:
        if args.prompt is not None:
            await _answer(llm, [*messages, {"role": "user", "content": args.prompt}], _sampling(args))
            return 0
        while (line := await _read_line("> ")) is not None:
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            text = await _answer(llm, messages, _sampling(args))
            messages.append({"role": "assistant", "content": text})
    return 0


async def _answer(llm: AsyncLLM, messages: list[dict[str, Any]], sampling: dict[str, Any]) -> str:
    text = ""
    async for piece in llm.chat(messages, **sampling).text_stream():
        text += piece
        print(piece, end="", flush=True)
    print()
    return text


async def _generate(args: argparse.Namespace) -> int:
    prompt = args.prompt if args.prompt is not None else await asyncio.to_thread(sys.stdin.read)
    async with await _create(args) as llm:
        async for piece in llm.generate(prompt, **_sampling(args)).text_stream():
            print(piece, end="", flush=True)
        print()
    return 0


async def _info(args: argparse.Namespace) -> int:
    async with await _create(args) as llm:
        print(f"{llm.config.model}\n")
        for name in llm.config.__struct_fields__[1:]:
            print(f"  {name:<24} {getattr(llm.config, name)}")
        print(f"\n{llm.startup}")
    return 0


async def _read_line(prompt: str) -> str | None:
    def ask() -> str | None:
        try:
            return input(prompt)
        except EOFError:
            return None

    return await asyncio.to_thread(ask)
