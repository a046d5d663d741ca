"""What each format of the weights and of the cache costs in accuracy, on a text shipped beside this file.

    python benchmarks/perplexity.py [--model FILE.gguf] [--formats float32 bfloat16 ...] [--oracle]

Every position of the text is predicted from all before it, by the worker's own step program, in steps of 64
positions. Printed for each format: the mean log-probability of the text's tokens and the perplexity, and
beside them the mean and the largest difference of a token's log-probability from float32, and how often the
most likely token is that of float32. `--oracle` computes the same with transformers in float32 (needs the
`test` extra), on the weights as dequantized from the file.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import msgpack
from numpy.typing import NDArray

from asyncengine.checkpoint.demo import demo_model
from asyncengine.checkpoint.gguf import GGUFFile
from asyncengine.checkpoint.gguf_spec import spec_from_gguf
from asyncengine.checkpoint.spec import DType, KVDType
from asyncengine.cores import usable_cores
from asyncengine.text.gguf_tokenizer import load_gguf_tokenizer
from asyncengine.wire.plan import SAMPLE, VERIFY
from asyncengine.wire.stages import Allocate, WorkerConfig
from asyncengine.worker.runner import Runner

BLOCK = 32
CHUNK = 64


class Format(NamedTuple):
    dtype: DType
    quantization: str | None = None
    kv_dtype: KVDType | None = None


FORMATS = {
    "float32": Format("float32"),
    "bfloat16": Format("bfloat16"),
    "float16": Format("float16"),
    "gguf": Format("bfloat16", "gguf"),
    "int8": Format("bfloat16", "int8"),
    "int4": Format("bfloat16", "int4"),
    "bfloat16, int8 KV": Format("bfloat16", None, "int8"),
    "int8, int8 KV": Format("bfloat16", "int8", "int8"),
}


class Scores(NamedTuple):
    logprobs: NDArray[np.float64]
    """[tokens - 1] of every token given those before it."""
    best: NDArray[np.int64]
    """[tokens - 1] the most likely tokens."""


def score(logits: NDArray[Any], following: NDArray[np.int32]) -> Scores:
    """`logits` [n, vocabulary] of n positions, `following` [n] the tokens that come next."""
    values = logits.astype(np.float64)
    most = values.max(axis=1, keepdims=True)
    normal = most[:, 0] + np.log(np.exp(values - most).sum(axis=1))
    return Scores(values[np.arange(len(values)), following] - normal, values.argmax(axis=1))


def joined(parts: list[Scores]) -> Scores:
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def engine_scores(path: str, tokens: NDArray[np.int32], format: Format, threads: int) -> Scores:
    config = WorkerConfig(
        spec=spec_from_gguf(GGUFFile(path)),
        weights=path,
        load_format="gguf",
        device="cpu",
        dtype=format.dtype,
        quantization=format.quantization,
        kv_dtype=format.kv_dtype or format.dtype,
        block_size=BLOCK,
        max_model_len=len(tokens),
        max_num_seqs=1,
        max_num_samples=CHUNK,
        max_logprobs=0,
        max_num_batched_tokens=CHUNK,
        num_threads=threads,
        enforce_eager=False,
        seed=0,
    )
    runner = Runner(0, 1, {})
    blocks = -(-len(tokens) // BLOCK)
    for stage in ("config", "load", "profile", "allocate", "capture"):
        payload = {"config": msgpack.encode(config), "allocate": msgpack.encode(Allocate(blocks))}
        runner.run_stage(stage, payload.get(stage, b""), lambda *_: None)
    parts = []
    table = [word for index in range(blocks) for word in (0, index, index)]
    for start in range(0, len(tokens) - 1, CHUNK):
        inputs = tokens[start : min(start + CHUNK, len(tokens) - 1)]
        count = len(inputs)
        # One row of which every position is sampled; the whole block table comes with each plan.
        header = [0, 1, 1, count, blocks, 0, 0, 0, 0, start, count, SAMPLE | VERIFY]
        plan = np.array([*header, *table, *inputs.tolist()], np.int32).tobytes()
        runner._batch.prepare(plan)
        runner.backend.modes.k[:count] = -1
        runner.backend.run(runner._batch)
        parts.append(score(runner.backend.logits[:count], tokens[start + 1 : start + 1 + count]))
    runner.close()
    return joined(parts)


def oracle_scores(path: str, tokens: NDArray[np.int32]) -> Scores:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    folder, file = os.path.split(path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    with torch.inference_mode():
        logits = model(torch.tensor([tokens.tolist()])).logits[0, :-1]
    spans = range(0, len(logits), CHUNK)
    return joined([score(logits[i : i + CHUNK].numpy(), tokens[1:][i : i + CHUNK]) for i in spans])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a GGUF file; the demo model by default")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--text", type=Path, default=Path(__file__).with_suffix(".txt"))
    parser.add_argument("--tokens", type=int, default=4096, help="at most so many of the text")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--oracle", action="store_true")
    args = parser.parse_args()
    path = os.path.abspath(args.model or demo_model())
    tokenizer = load_gguf_tokenizer(GGUFFile(path).metadata)
    tokens = np.array(tokenizer.encode(args.text.read_text())[: args.tokens], np.int32)
    print(f"{len(tokens)} tokens of {args.text.name}, {os.path.basename(path)}")
    print(f"{'':20}{'mean logprob':>14}{'perplexity':>12}{'mean diff':>12}{'max diff':>10}{'same best':>11}")
    reference = None
    for name in dict.fromkeys(["float32", *["transformers"] * args.oracle, *args.formats]):
        if name == "transformers":
            scores = oracle_scores(path, tokens)
        else:
            scores = engine_scores(path, tokens, FORMATS[name], args.threads)
        reference = reference or scores
        mean = float(scores.logprobs.mean())
        apart = np.abs(scores.logprobs - reference.logprobs)
        same = float((scores.best == reference.best).mean())
        print(
            f"{name:20}{mean:14.5f}{math.exp(-mean):12.4f}{apart.mean():12.6f}{apart.max():10.4f}{same:11.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
