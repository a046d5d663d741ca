"""Two ranks of the CUDA backend, on CPU tensors with gloo: the same tokens as from one CPU rank."""

import os

import numpy as np
import pytest

from .cuda_host import SIZES
from .plans import decode_result
from .ranks import recording, run_ranks
from .tiny import Started, assert_greedy, make_model, prompt, spec_of, worker_config

PROMPTS = {0: prompt(11), 2: prompt(3)}


def run_together(config, plans, world, directory):
    """(bytes of weights by rank, results of rank 0)"""
    fd = os.memfd_create("rendezvous")
    gloo = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    try:
        weights, results = run_ranks("cuda_rank.py", fd, config, plans, world, directory, 120, **gloo)
    finally:
        os.close(fd)
    return weights, results[0]


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
        driver = recording(started, plans, single)
        tokens = driver.generate(PROMPTS, 4, chunk=8, stagger=1, logprobs=2)
        whole = started.loaded.weight_bytes
    for slot, ids in PROMPTS.items():
        assert_greedy(model, ids, tokens[slot])
    config = worker_config(spec, tmp_path, **{k: v for k, v in SIZES.items() if k != "num_blocks"})
    weights, results = run_together(config, plans, 2, tmp_path)
    for ours, theirs in zip(map(decode_result, results), map(decode_result, single), strict=True):
        assert ours.tokens == theirs.tokens
        for sample, row in theirs.details.logprobs.items() if theirs.details else ():
            assert ours.details.logprobs[sample].top_ids == row.top_ids
            np.testing.assert_allclose(
                ours.details.logprobs[sample].top_logprobs, row.top_logprobs, atol=2e-4
            )
    assert max(weights) < 0.75 * whole
