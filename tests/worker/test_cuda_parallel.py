"""Two ranks of the CUDA backend, on CPU tensors with gloo: the same tokens as from one CPU rank."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from asyncengine.wire.stages import Loaded

from .cuda_host import SIZES
from .plans import decode_result
from .tiny import Started, assert_greedy, make_model, prompt, spec_of, worker_config

PROMPTS = {0: prompt(11), 2: prompt(3)}


def run_ranks(config, plans, world, directory):
    """(bytes of weights by rank, results of rank 0)"""
    (directory / "config").write_bytes(msgspec.msgpack.encode(config))
    (directory / "plans").write_bytes(msgspec.msgpack.encode(plans))
    fd = os.memfd_create("rendezvous")
    command = [sys.executable, "-P", Path(__file__).with_name("cuda_rank.py")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(fd), directory], env=environment, pass_fds=[fd]
        )
        for rank in range(world)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        os.close(fd)
    replies = [msgspec.msgpack.decode((directory / f"rank-{rank}").read_bytes()) for rank in range(world)]
    return [msgspec.msgpack.decode(loaded, type=Loaded).weight_bytes for loaded, _ in replies], replies[0][1]


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        # 211 = 105 + 106; the bias of a row-parallel layer is added once
        ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    ],
)
def test_two_ranks_agree_with_one(architecture, fields, tmp_path):
    model = make_model(architecture, num_hidden_layers=2, **fields)
    model.save_pretrained(tmp_path)
    spec, plans, single = spec_of(tmp_path), [], []
    with Started(spec, tmp_path, **(SIZES | {"device": "cpu"})) as started:
        driver = started.driver()

        def step(plan):
            plans.append(plan)
            single.append(started.runner.step(plan))
            return single[-1]

        driver.run = step
        tokens = driver.generate(PROMPTS, 4, chunk=8, stagger=1, logprobs=2)
        whole = started.loaded.weight_bytes
    for slot, ids in PROMPTS.items():
        assert_greedy(model, ids, tokens[slot])
    config = worker_config(spec, tmp_path, **{k: v for k, v in SIZES.items() if k != "num_blocks"})
    weights, results = run_ranks(config, plans, 2, tmp_path)
    for ours, theirs in zip(map(decode_result, results), map(decode_result, single), strict=True):
        assert ours.tokens == theirs.tokens
        for sample, row in theirs.details.logprobs.items() if theirs.details else ():
            assert ours.details.logprobs[sample].top_ids == row.top_ids
            np.testing.assert_allclose(
                ours.details.logprobs[sample].top_logprobs, row.top_logprobs, atol=2e-4
            )
    assert max(weights) < 0.75 * whole
