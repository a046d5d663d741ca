"""Output tokens per second of whole batches, beside transformers in the same run.

    python benchmarks/offline.py [--dtype bfloat16] [--rounds 3] [--model FILE.gguf]

The workload of 1, 8 and 32 requests at once: prompts of 128 ids, 128 new tokens each, greedy, end to
end; then the time of one prefill of 1,024 tokens. The engines run in processes of their own, in turn,
and the medians of the rounds are printed. Needs the `test` extra.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

BATCHES = (1, 8, 32)
LENGTH = 128
PREFILL = 1024


def prompt(number: int, length: int) -> list[int]:
    return [(number * 7 + i * 13) % 40000 + 100 for i in range(length)]


async def run_ours(model: str, dtype: str) -> dict[str, Any]:
    from asyncengine import AsyncLLM

    begin = time.perf_counter()
    async with await AsyncLLM.create(model, dtype=dtype, enable_prefix_caching=False) as llm:
        figures: dict[str, Any] = {"start_s": time.perf_counter() - begin}

        async def run(count: int, length: int, new: int) -> tuple[float, list[list[int]]]:
            prompts = [prompt(number, length) for number in range(count)]
            begin = time.perf_counter()
            outputs = await llm.generate_many(prompts, max_tokens=new, temperature=0, ignore_eos=True)
            seconds = time.perf_counter() - begin
            assert all(len(o.outputs[0].token_ids) == new for o in outputs)
            return seconds, [o.outputs[0].token_ids for o in outputs]

        await run(1, 16, 8)
        for count in BATCHES:
            await run(count, LENGTH, 4)
            seconds, ids = await run(count, LENGTH, LENGTH)
            figures[f"tok_s_{count}"] = count * LENGTH / seconds
            figures["ids"] = ids[0][:16]
        figures["prefill_ms"] = 1000 * min([(await run(1, PREFILL, 1))[0] for _ in range(3)])
        return figures


def run_transformers(model: str, dtype: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    begin = time.perf_counter()
    directory, file = os.path.split(model)
    oracle = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=file,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    figures: dict[str, Any] = {"start_s": time.perf_counter() - begin}

    def run(count: int, length: int, new: int) -> tuple[float, list[list[int]]]:
        ids = torch.tensor([prompt(number, length) for number in range(count)])
        begin = time.perf_counter()
        with torch.inference_mode():
            out = oracle.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=2,
            )
        return time.perf_counter() - begin, out[:, length:].tolist()

    run(1, 16, 8)
    for count in BATCHES:
        run(count, LENGTH, 4)
        seconds, ids = run(count, LENGTH, LENGTH)
        figures[f"tok_s_{count}"] = count * LENGTH / seconds
        figures["ids"] = ids[0][:16]
    figures["prefill_ms"] = 1000 * min(run(1, PREFILL, 1)[0] for _ in range(3))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a GGUF file; the demo model by default")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the medians to this file")
    parser.add_argument("--engine", choices=("asyncengine", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        from asyncengine.checkpoint.demo import demo_model

        args.model = demo_model()
    if args.engine == "asyncengine":
        print(json.dumps(asyncio.run(run_ours(args.model, args.dtype))))
        return
    if args.engine == "transformers":
        print(json.dumps(run_transformers(args.model, args.dtype)))
        return

    rounds: dict[str, list[dict[str, Any]]] = {"asyncengine": [], "transformers": []}
    for number in range(args.rounds):
        for engine in sorted(rounds, reverse=number % 2 == 1):
            command = [
                sys.executable,
                __file__,
                "--engine",
                engine,
                "--model",
                args.model,
                "--dtype",
                args.dtype,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{engine} failed:\n{done.stderr}")
            rounds[engine].append(json.loads(done.stdout.splitlines()[-1]))

    keys = ["start_s", *(f"tok_s_{count}" for count in BATCHES), "prefill_ms"]
    medians = {
        engine: {key: statistics.median(r[key] for r in results) for key in keys}
        for engine, results in rounds.items()
    }
    print(f"{args.dtype}, {args.rounds} rounds, {len(os.sched_getaffinity(0))} cores")
    print(f"{'':14}" + "".join(f"{key:>14}" for key in keys))
    for engine, row in medians.items():
        print(f"{engine:14}" + "".join(f"{row[key]:14.1f}" for key in keys))
    ratios = [medians["asyncengine"][key] / medians["transformers"][key] for key in keys]
    print(f"{'ratio':14}" + "".join(f"{ratio:14.2f}" for ratio in ratios))
    prefixes = [
        next((i for i, (a, b) in enumerate(zip(ours["ids"], theirs["ids"], strict=True)) if a != b), 16)
        for ours, theirs in zip(*rounds.values(), strict=True)
    ]
    # In bfloat16 the two round at different places; in float32 all 16 are to agree.
    print(f"greedy ids agree for the first {min(prefixes)} of 16 tokens")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(medians, file, indent=2)


if __name__ == "__main__":
    main()
