"""Decode tokens per second with speculation by prompt lookup and without, in turns on one machine.

    python benchmarks/speculation.py [--dtype auto] [--rounds 5] [--new 128] [--model FILE.gguf]

Two kinds of prompts, 1 and 8 requests at once, greedy: `copy` asks to repeat a text, `story` to make one up.
Both engines stay open and answer alternately, so that they see the same machine; the medians of the
rounds are printed, prompt processing included, with the ratio of the two in each round. The ids must be
the same.
"""

import argparse
import asyncio
import statistics
import time
from typing import Any

from asyncengine import AsyncLLM
from asyncengine.checkpoint.demo import demo_model

TEXT = (
    "The harbour of {0} lies on the northern shore. In {1} its lighthouse was raised by {2} metres, and "
    "ships of {3} tons could enter at low tide. The keeper, a man called {4}, wrote down every vessel in a "
    "blue ledger with {5} pages, which the museum still shows to visitors on Sundays."
)
NAMES = ("Port Ellis", "Grisby", "Saint Malo", "Tarn", "Ostrava Bay", "Kinloch", "Varna", "Whitby")


def prompt(kind: str, number: int) -> str:
    text = TEXT.format(NAMES[number], 1840 + 7 * number, 12 + number, 900 + 50 * number, "Bram", 300 + number)
    if kind == "copy":
        return (
            f"<|im_start|>user\nRepeat the following text exactly, word for word.\n\n{text}<|im_end|>\n"
            "<|im_start|>assistant\nThe harbour"
        )
    return (
        f"<|im_start|>user\nInvent a story about a sailor from {NAMES[number]}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def run(llm: AsyncLLM, kind: str, count: int, new: int) -> tuple[float, list[list[int]]]:
    begin = time.perf_counter()
    outputs = await llm.generate_many(
        [prompt(kind, number) for number in range(count)], max_tokens=new, temperature=0, ignore_eos=True
    )
    return count * new / (time.perf_counter() - begin), [o.outputs[0].token_ids for o in outputs]


def counted(llm: AsyncLLM) -> tuple[int, int, int]:
    metrics: dict[str, Any] = llm.metrics()
    names = ("steps_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")
    steps, drafted, accepted = (metrics[name] for name in names)
    return steps, drafted, accepted


async def main(model: str, dtype: str, rounds: int, new: int) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "max_model_len": 2048, "max_num_seqs": 16}
    async with (
        await AsyncLLM.create(model, **settings) as plain,
        await AsyncLLM.create(model, speculative={"method": "ngram"}, **settings) as ngram,
    ):
        for kind in ("copy", "story"):
            for count in (1, 8):
                speeds: dict[AsyncLLM, list[float]] = {plain: [], ngram: []}
                await run(plain, kind, count, 8)
                before = counted(ngram)
                for _ in range(rounds):
                    ids = []
                    for llm in (plain, ngram):
                        speed, tokens = await run(llm, kind, count, new)
                        speeds[llm].append(speed)
                        ids.append(tokens)
                    assert ids[0] == ids[1]
                steps, drafted, accepted = (
                    now - then for now, then in zip(counted(ngram), before, strict=True)
                )
                ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
                print(
                    f"{kind:6} x {count}: {statistics.median(speeds[plain]):7.1f} ->"
                    f" {statistics.median(speeds[ngram]):7.1f} tokens/s, ratio {ratio:.2f};"
                    f" {steps / rounds:.0f} steps a round, {accepted} of {drafted} drafted tokens accepted",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=128)
    args = parser.parse_args()
    asyncio.run(main(args.model, args.dtype, args.rounds, args.new))
