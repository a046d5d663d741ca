"""Several questions at once, each streamed as it comes: python examples/stream.py [MODEL]"""

import asyncio
import sys

from asyncengine import AsyncLLM
from asyncengine.checkpoint.demo import demo_model


async def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
    async with await AsyncLLM.create(model, max_model_len=2048) as llm:

        async def ask(question: str) -> None:
            messages = [{"role": "user", "content": question}]
            answer = await llm.chat(messages, max_tokens=60, temperature=0)
            print(f"{question}\n  {answer.outputs[0].text}\n  {answer.metrics.total:.2f} s\n")

        await asyncio.gather(
            *map(ask, ["What is the capital of France?", "Name three fruits.", "What is 2 + 2?"])
        )


asyncio.run(main())
