"""Model descriptions against transformers' own configuration classes."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine.checkpoint.config import apply_overrides, load_config, spec_from_config
from asyncengine.checkpoint.generation import generation_defaults, generation_eos_ids, with_eos_ids
from asyncengine.checkpoint.hub import resolve_model
from asyncengine.checkpoint.model import load_spec
from asyncengine.errors import ConfigError, ModelLoadError
from asyncengine.params import SamplingParams

BASE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]


def made(model_type, **fields):
    return {**BASE, "model_type": model_type, **fields}


def reference(config):
    """transformers' reading of a config.json, as its rotary embedding sees it."""
    from transformers import AutoConfig

    config = json.loads(json.dumps(config))
    found = AutoConfig.for_model(config.pop("model_type"), **config)
    found.standardize_rope_params()
    return found


def equal_to_reference(config):
    spec, theirs = spec_from_config(config), reference(config)
    assert spec.architecture.lower() == theirs.model_type + "forcausallm"
    assert spec.vocab_size == theirs.vocab_size
    assert spec.hidden_size == theirs.hidden_size
    assert spec.intermediate_size == theirs.intermediate_size
    assert spec.num_layers == theirs.num_hidden_layers
    assert spec.num_heads == theirs.num_attention_heads
    assert spec.num_kv_heads == theirs.num_key_value_heads
    # Qwen2 has no such field; its attention takes the quotient then.
    quotient = theirs.hidden_size // theirs.num_attention_heads
    assert spec.head_dim == getattr(theirs, "head_dim", quotient)
    assert spec.norm_eps == theirs.rms_norm_eps
    assert spec.hidden_act == theirs.hidden_act
    assert spec.max_position == theirs.max_position_embeddings
    assert spec.tie_embeddings == theirs.tie_word_embeddings
    assert spec.bos_token_id == theirs.bos_token_id
    ends = theirs.eos_token_id
    assert spec.eos_token_ids == (() if ends is None else tuple(np.atleast_1d(ends)))
    dtype = None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch.")
    assert spec.dtype == dtype
    rope = theirs.rope_parameters
    assert spec.rope_theta == rope["rope_theta"]
    if spec.rope_scaling is None:
        assert rope["rope_type"] == "default"
    else:
        scaling = spec.rope_scaling
        assert scaling.type == rope["rope_type"]
        assert scaling.factor == (rope["factor"] or spec.max_position / scaling.original_max_position)
        assert scaling.original_max_position == rope.get(
            "original_max_position_embeddings", theirs.max_position_embeddings
        )
        for name in ("low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim"):
            if name in rope:
                assert getattr(scaling, name) == rope[name]
        assert scaling.beta_fast == (rope.get("beta_fast") or 32)
        assert scaling.beta_slow == (rope.get("beta_slow") or 1)
        assert scaling.truncate == rope.get("truncate", True)
    return spec, theirs


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_defaults(model_type):
    fields = {} if model_type in ("llama", "mistral") else {"num_attention_heads": 32}
    fields |= {"num_attention_heads": 8} if model_type == "mistral" else {}
    equal_to_reference(made(model_type, **fields))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all_fields(model_type):
    spec, _ = equal_to_reference(
        made(
            model_type,
            num_key_value_heads=2,
            head_dim=24,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=[3, 4, 3, 5][:2],
            dtype="bfloat16",
            rope_theta=500000.0,
            rope_scaling=None,
        )
    )
    assert (spec.rope_theta, spec.rope_scaling, spec.dtype) == (500000.0, None, "bfloat16")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
         "beta_slow": 2, "attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
        {"rope_type": "yarn", "factor": 16.0, "beta_fast": None, "beta_slow": 0, "mscale": 0.5},
        {"rope_type": "default"},
    ],
)  # fmt: skip
def test_rope_scaling(model_type, layout, rope):
    rope = dict(rope)
    config = made(model_type, max_position_embeddings=256, num_key_value_heads=2)
    if layout == "rope_parameters":
        rope["rope_theta"] = 1e6
    else:
        config["rope_theta"] = 1e6
    spec, _ = equal_to_reference(config | {layout: rope})
    assert spec.rope_theta == 1e6


def test_original_length_beside_the_scaling_wins():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = made(
        "llama", max_position_embeddings=256, rope_scaling=rope, original_max_position_embeddings=32
    )
    spec, _ = equal_to_reference(config)
    assert spec.rope_scaling.original_max_position == 32


def test_context_that_scaling_reaches():
    def context(rope):
        return spec_from_config(made("llama", max_position_embeddings=256, rope_parameters=rope)).max_context

    assert context(None) == 256
    assert context({"rope_type": "linear", "factor": 2.5}) == 640
    assert context({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}) == 1024
    assert context({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}) == 256
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert context(llama3) == 256


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("llama", {"sliding_window": 8}, (0, 0, 0)),
        ("mistral", {}, (4096, 4096, 4096)),
        ("mistral", {"sliding_window": None}, (0, 0, 0)),
        ("mistral", {"sliding_window": 7}, (7, 7, 7)),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 1}, (0, 0, 0)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (0, 8, 8)),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 28}, (0, 0, 0)),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (0, 0, 0)),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (5, 0, 5),
        ),
    ],
)
def test_sliding_windows(model_type, fields, expected):
    config = made(model_type, num_key_value_heads=2, **fields)
    spec, theirs = equal_to_reference(config)
    assert spec.sliding_windows == expected
    if model_type.startswith("qwen"):
        kinds = theirs.layer_types
        assert expected == tuple(
            theirs.sliding_window or 0 if kind == "sliding_attention" else 0 for kind in kinds
        )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("flag", [False, True])
def test_biases_and_norms_are_those_of_the_transformers_model(model_type, flag):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = made(model_type, num_key_value_heads=2, attention_bias=flag, mlp_bias=flag)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(reference(config))
    names = set(model.state_dict())
    spec = spec_from_config(config)
    layer = "model.layers.0."
    assert spec.qkv_bias == (layer + "self_attn.q_proj.bias" in names)
    assert spec.qkv_bias == (layer + "self_attn.v_proj.bias" in names)
    assert spec.output_bias == (layer + "self_attn.o_proj.bias" in names)
    assert spec.mlp_bias == (layer + "mlp.down_proj.bias" in names)
    assert spec.qk_norm == (layer + "self_attn.q_norm.weight" in names)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ({"architectures": []}, ["architectures"]),
        ({"model_type": "gpt2"}, ["model_type", "'gpt2'", "qwen3"]),
        ({"model_type": None}, ["model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8", "GGUF"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, ["rope_type", "longrope", "yarn"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, ["mrope"]),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, ["mrope_section"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["per kind of layer"]),
        ({"rope_parameters": [1]}, ["rope_parameters"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor=0.5"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor='2'", "number"]),
        ({"rope_scaling": {"type": ["linear"]}}, ["rope_type"]),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_theta": 0}, ["rope_theta=0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn", "bfloat16"]),
        ({"torch_dtype": 16}, ["dtype=16"]),
        ({"hidden_size": None}, ["no hidden_size"]),
        ({"hidden_size": 0}, ["hidden_size=0"]),
        ({"hidden_size": 2**20 + 1}, ["hidden_size"]),
        ({"hidden_size": 64.0}, ["hidden_size=64.0", "integer"]),
        ({"hidden_size": True}, ["hidden_size=True"]),
        ({"hidden_size": 66}, ["num_attention_heads=4", "hidden_size=66"]),
        ({"hidden_size": 36}, ["head_dim=9", "even"]),
        ({"num_hidden_layers": 4097}, ["num_hidden_layers=4097"]),
        ({"num_hidden_layers": 10**30}, ["num_hidden_layers"]),
        ({"vocab_size": -5}, ["vocab_size=-5"]),
        ({"vocab_size": 2**24 + 1}, ["vocab_size"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "divide"]),
        ({"num_key_value_heads": 8}, ["num_key_value_heads=8"]),
        ({"head_dim": 2**40}, ["head_dim"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps"]),
        ({"max_position_embeddings": 2**31}, ["max_position_embeddings"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings=1"]),
        ({"eos_token_id": [1, "2"]}, ["eos_token_id"]),
        ({"eos_token_id": -1}, ["eos_token_id"]),
        ({"bos_token_id": 2**31}, ["bos_token_id"]),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 0},
         ["sliding_window=0"]),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "layer_types": ["a"]},
         ["layer_types", "3 layers"]),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True,
          "layer_types": ["chunked_attention"] * 3}, ["layer_types", "chunked_attention", "full_attention"]),
    ],
)  # fmt: skip
def test_refused(fields, words):
    with pytest.raises(ModelLoadError) as caught:
        spec_from_config(made("llama") | fields)
    for word in words:
        assert word in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
KEYS = [
    *BASE, "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings",
    "attention_bias", "bos_token_id", "eos_token_id", "use_sliding_window", "sliding_window", "layer_types",
    "max_window_layers", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "dtype",
    "torch_dtype", "architectures", "quantization_config",
]  # fmt: skip
ROPE_KEYS = [
    "type",
    "rope_type",
    "factor",
    "original_max_position_embeddings",
    "truncate",
    "beta_fast",
    "mscale",
]


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(ARCHITECTURES),
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4),
    st.none() | st.dictionaries(st.sampled_from(ROPE_KEYS), st.just("yarn") | json_values, max_size=4),
)
def test_any_json_gives_a_spec_or_a_model_load_error(model_type, fields, rope):
    config = made(model_type, num_key_value_heads=2) | fields
    if rope is not None:
        config["rope_parameters"] = rope
    try:
        spec = spec_from_config(config)
    except ModelLoadError:
        return
    assert spec.num_heads % spec.num_kv_heads == 0
    assert len(spec.sliding_windows) == spec.num_layers
    assert math.isfinite(spec.rope_theta) and spec.max_context >= spec.max_position


def test_overrides():
    config = made("llama", dtype="bfloat16", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert apply_overrides(config, None) == config
    spec = spec_from_config(apply_overrides(config, {"max_position_embeddings": 99, "unknown": 1}))
    assert spec.max_position == 99
    assert spec_from_config(apply_overrides(config, {"torch_dtype": "float16"})).dtype == "float16"
    assert spec_from_config(apply_overrides(config, {"rope_theta": 900.0})).rope_theta == 900.0
    spec = spec_from_config(apply_overrides(config, {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    assert (spec.rope_theta, spec.rope_scaling.type) == (500.0, "linear")
    old = made("llama", rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert spec_from_config(apply_overrides(old, {"rope_scaling": None})).rope_scaling is None
    spec = spec_from_config(
        apply_overrides(old, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    )
    assert (spec.rope_theta, spec.rope_scaling) == (7.0, None)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
    for wrong in ([], "x", 1, {1: 2}):
        with pytest.raises(ConfigError, match="hf_overrides") as caught:
            apply_overrides(config, wrong)
        assert caught.value.parameter == "hf_overrides"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"a": \xff}', b"[" * 9999, b'{"a": NaN}'])
def test_damaged_config_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_config(tmp_path)


def test_missing_and_oversized_config_json(tmp_path):
    with pytest.raises(ModelLoadError, match=r"holds no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (17 << 20))
    with pytest.raises(ModelLoadError, match="not a configuration"):
        load_config(tmp_path)


def test_generation_config(tmp_path):
    assert generation_defaults(tmp_path) == {} and generation_eos_ids(tmp_path) == ()
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps(
            {
                "do_sample": False,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": None,
                "max_new_tokens": 7,
                "repetition_penalty": 1.1,
                "eos_token_id": [9, 2],
                "transformers_version": "5",
            }
        )
    )
    defaults = generation_defaults(tmp_path)
    assert defaults == {"temperature": 0.6, "top_k": 20, "max_tokens": 7, "repetition_penalty": 1.1}
    assert SamplingParams.from_fields({"top_k": 1}, defaults=defaults).temperature == 0.6
    (tmp_path / "config.json").write_text(json.dumps(made("llama", eos_token_id=2)))
    files = resolve_model(tmp_path, load_format="dummy")
    assert load_spec(files).eos_token_ids == (2, 9)
    assert load_spec(files, {"eos_token_id": 5}).eos_token_ids == (5, 9, 2)
    spec = spec_from_config(made("llama"))
    assert with_eos_ids(spec, ()) == spec
    for wrong in ({"temperature": -1}, {"top_p": 2.0}, {"top_k": "many"}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ModelLoadError, match=r"generation_config\.json.*" + next(iter(wrong))):
            generation_defaults(tmp_path)
