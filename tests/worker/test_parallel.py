"""Tensor parallelism with real processes: the same plans give the tokens of one rank."""

import os

import pytest

from asyncengine._fast.cpu import Comm
from asyncengine.checkpoint.sharding import comm_region_bytes

from .plans import decode_result
from .ranks import recording, run_ranks
from .tiny import Started, assert_greedy, make_model, prompt, spec_of, worker_config

PROMPTS = {0: prompt(20), 5: prompt(3), 2: prompt(11)}


def run_together(config, plans, world, directory):
    """(bytes of weights by rank, results of rank 0)"""
    fd = os.memfd_create("comm")
    try:
        os.ftruncate(fd, Comm.bytes_needed(world, comm_region_bytes(config.spec)))
        weights, (first, *others) = run_ranks("rank.py", fd, config, plans, world, directory, 60)
    finally:
        os.close(fd)
    assert all(result is None for results in others for result in results)
    return weights, first


@pytest.mark.parametrize(
    ("architecture", "world", "fields"),
    [
        ("Llama", 2, {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2", 4, {"tie_word_embeddings": True}),  # 2 KV heads: each on two ranks
        (
            "Qwen3",
            3,
            {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16},
        ),  # 211 = 70 + 70 + 71
    ],
)
def test_ranks_agree_with_one(architecture, world, fields, tmp_path):
    model = make_model(architecture, **fields)
    model.save_pretrained(tmp_path)
    spec, plans, single = spec_of(tmp_path), [], []
    with Started(spec, tmp_path) as started:
        driver = recording(started, plans, single)
        tokens = driver.generate(PROMPTS, 10, chunk=8, stagger=1)
        whole = started.loaded.weight_bytes
    for slot, ids in PROMPTS.items():
        assert_greedy(model, ids, tokens[slot])
    weights, results = run_together(worker_config(spec, tmp_path, num_threads=1), plans, world, tmp_path)
    assert [decode_result(r).tokens for r in results] == [decode_result(r).tokens for r in single]
    assert max(weights) < (0.75 if world < 4 else 0.6) * whole
