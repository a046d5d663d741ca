"""The tables against transformers' own rotary embedding."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from asyncengine.checkpoint.spec import ModelSpec, RopeScaling
from asyncengine.worker.rope import cos_sin_table

ORIGINAL = 64
RULES = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": ORIGINAL},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn-mscale": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "mscale": 0.7,
                    "mscale_all_dim": 1.3, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn-factor": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.5},
}  # fmt: skip


def make_spec(rule, **fields):
    scaling = None
    if rule != "default":
        values = dict(RULES[rule])
        values["original_max_position"] = values.pop("original_max_position_embeddings", ORIGINAL)
        scaling = RopeScaling(type=rule.split("-")[0], **values)
    values = dict(
        architecture="LlamaForCausalLM", vocab_size=100, hidden_size=128, intermediate_size=128, num_layers=1,
        num_heads=4, num_kv_heads=2, head_dim=32, norm_eps=1e-5, hidden_act="silu", rope_theta=10000.0,
        rope_scaling=scaling, max_position=256, tie_embeddings=False, qkv_bias=False, output_bias=False,
        mlp_bias=False, qk_norm=False, sliding_windows=(0,), dtype=None, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip
    return ModelSpec(**(values | fields))


def reference(rule, positions):
    """[positions, 2 * pairs] from transformers, called once with all positions."""
    parameters = {"rope_type": rule.split("-")[0], "rope_theta": 10000.0, **RULES[rule]}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, head_dim=32, rope_parameters=parameters,
        max_position_embeddings=ORIGINAL if rule == "dynamic" else 256,
    )  # fmt: skip
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    return np.hstack((cos[0, :, :16].numpy(), sin[0, :, :16].numpy()))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "dynamic"])
def test_equals_transformers(rule):
    table = cos_sin_table(make_spec(rule), 200)
    assert table.shape == (200, 32) and table.dtype == np.float32
    np.testing.assert_allclose(table, reference(rule, 200), atol=3e-5)


def test_dynamic_equals_transformers_up_to_the_original_length():
    table = cos_sin_table(make_spec("dynamic"), 200)
    np.testing.assert_allclose(table[:ORIGINAL], reference("dynamic", ORIGINAL), atol=2e-5)


def test_dynamic_follows_each_position_beyond_it():
    table = cos_sin_table(make_spec("dynamic"), 200)
    for position in (ORIGINAL, 100, 199):
        np.testing.assert_allclose(table[position], reference("dynamic", position + 1)[-1], atol=3e-5)
