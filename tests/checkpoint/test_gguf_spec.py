"""Model descriptions in GGUF files, against what transformers reads and what was written."""

import math
import os

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, quants

from asyncengine.checkpoint.gguf import GGUFFile
from asyncengine.checkpoint.gguf_spec import spec_from_gguf
from asyncengine.checkpoint.hub import resolve_model
from asyncengine.checkpoint.model import load_spec
from asyncengine.errors import ModelLoadError


def test_demo_gguf_equals_transformers(demo_gguf):
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(os.path.dirname(demo_gguf), gguf_file=os.path.basename(demo_gguf))
    spec = load_spec(resolve_model(demo_gguf))
    assert spec.architecture == "LlamaForCausalLM"
    for ours, name in {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "head_dim": "head_dim",
        "num_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps", "hidden_act": "hidden_act",
        "max_position": "max_position_embeddings", "tie_embeddings": "tie_word_embeddings",
    }.items():  # fmt: skip
        assert getattr(spec, ours) == getattr(theirs, name), ours
    assert spec.rope_theta == theirs.rope_parameters["rope_theta"]
    assert spec.rope_scaling is None and theirs.rope_parameters["rope_type"] == "default"
    assert not (
        spec.qkv_bias or spec.output_bias or spec.mlp_bias or spec.qk_norm or any(spec.sliding_windows)
    )
    assert spec.dtype is None and spec.rope_factors is None
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))


def gguf(path, arch="llama", *, tensors=(), kind="F32", **metadata):
    writer = GGUFWriter(path, arch)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in metadata.items():
        getattr(writer, "add_" + name)(value)
    shapes = {"token_embd.weight": (7, 64), "output_norm.weight": (64,), **dict(tensors)}
    for name, shape in shapes.items():
        array = np.ones(shape, np.float32)
        code = GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        writer.add_tensor(name, quants.quantize(array, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.mark.parametrize(
    ("arch", "architecture"),
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")],
)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", None)]
)
def test_gguf_specs(tmp_path, arch, architecture, kind, dtype):
    spec = spec_from_gguf(gguf(tmp_path / "m.gguf", arch, kind=kind))
    assert (spec.architecture, spec.dtype) == (architecture, dtype)
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size, spec.num_layers) == (7, 64, 96, 1)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_position) == (4, 4, 16, 512)
    assert spec.norm_eps == np.float32(1e-5) and spec.rope_theta == 10000.0 and spec.tie_embeddings
    assert spec.qk_norm == (arch == "qwen3") and not spec.qkv_bias and spec.eos_token_ids == ()


def test_gguf_details(tmp_path):
    found = gguf(
        tmp_path / "m.gguf",
        tensors={"output.weight": (7, 64), "blk.0.attn_q.bias": (128,), "rope_freqs.weight": (16,)},
        key_length=32,
        value_length=32,
        rope_dimension_count=32,
        head_count_kv=2,
        rope_freq_base=500000.0,
        bos_token_id=1,
        eos_token_id=2,
        eot_token_id=5,
    )
    spec = spec_from_gguf(found)
    assert (spec.num_kv_heads, spec.head_dim, spec.rope_theta) == (2, 32, 500000.0)
    assert (spec.tie_embeddings, spec.qkv_bias, spec.output_bias) == (False, True, False)
    assert spec.rope_factors == (1.0,) * 16
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2, 5))
    assert spec_from_gguf(found, {"max_position_embeddings": 64}).max_position == 64


def test_gguf_rope_scaling(tmp_path):
    def scaling(name, **metadata):
        return spec_from_gguf(gguf(tmp_path / name, **metadata)).rope_scaling

    assert scaling("a", rope_scaling_type=RopeScalingType.NONE) is None
    linear = scaling("b", rope_scaling_type=RopeScalingType.LINEAR, rope_scaling_factor=4.0)
    assert (linear.type, linear.factor, linear.original_max_position) == ("linear", 4.0, 512)
    yarn = {"rope_scaling_type": RopeScalingType.YARN, "rope_scaling_factor": 4.0}
    found = scaling("c", **yarn, rope_scaling_orig_ctx_len=128, rope_scaling_yarn_beta_fast=16.0)
    assert (found.type, found.factor, found.original_max_position) == ("yarn", 4.0, 128)
    assert (found.beta_fast, found.beta_slow, found.attention_factor) == (16.0, 1.0, None)
    found = scaling("d", **yarn, rope_scaling_attn_factors=2.0)
    assert found.attention_factor == pytest.approx(2.0 * (0.1 * math.log(4.0) + 1.0))


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({"arch": "gemma3"}, "architecture 'gemma3'; supported: llama, qwen2, qwen3"),
        ({"expert_count": 8}, "8 experts"),
        ({"rope_dimension_count": 8}, "rope.dimension_count=8"),
        ({"value_length": 8}, "value_length=8"),
        ({"arch": "qwen2", "sliding_window": 8}, "sliding_window=8"),
        ({"rope_scaling_type": RopeScalingType.LONGROPE}, "longrope"),
        ({"rope_scaling_type": RopeScalingType.YARN, "rope_scaling_factor": 4.0,
          "rope_scaling_yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ({"kind": "MXFP4"}, "type MXFP4; supported: BF16"),
        ({"tensors": {"rope_freqs.weight": (5,)}}, "5 rotary factors"),
        ({"head_count_kv": [1]}, "num_key_value_heads"),
    ],
)  # fmt: skip
def test_gguf_refused(tmp_path, metadata, word):
    with pytest.raises(ModelLoadError) as caught:
        spec_from_gguf(gguf(tmp_path / "m.gguf", **metadata))
    assert word in str(caught.value)


def test_gguf_without_the_essentials(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=r"model\.embed_tokens\.weight"):
        spec_from_gguf(GGUFFile(tmp_path / "m.gguf"))
