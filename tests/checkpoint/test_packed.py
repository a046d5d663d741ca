"""Quantized safetensors: what configurations mean, what the file shows, and what is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from asyncengine.checkpoint.packed import PackedCheckpoint
from asyncengine.checkpoint.packing import read_packing
from asyncengine.checkpoint.safetensors import open_safetensors
from asyncengine.checkpoint.spec import WeightPacking
from asyncengine.errors import ModelLoadError

from ..codes import LAYOUTS, Coded

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
SCHEME = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, "output_activations": None}


def compressed(*schemes, **fields):
    groups = {f"group_{i}": scheme for i, scheme in enumerate(schemes or [SCHEME])}
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    return base | {"config_groups": groups, "kv_cache_scheme": None, "sparsity_config": {}} | fields


def weights(**fields):
    return SCHEME | {"weights": WEIGHTS | fields}


def packing(method, bits=4, group_size=128, zero_shift=0):
    return WeightPacking(method=method, bits=bits, group_size=group_size, zero_shift=zero_shift)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, None),
        (AWQ, packing("awq")),
        (AWQ | {"zero_point": False, "version": "GEMM", "group_size": 64}, packing("awq", 4, 64)),
        (AWQ | {"modules_to_not_convert": ["visual"], "group_size": -1}, packing("awq", 4, -1)),
        (GPTQ, packing("gptq", zero_shift=1)),
        (GPTQ | {"bits": 8, "desc_act": True, "group_size": -1}, packing("gptq", 8, -1, 1)),
        (GPTQ | {"checkpoint_format": "gptq_v2", "lm_head": True}, packing("gptq")),
        (GPTQ | {"format": "gptq_v2", "dynamic": {"-:.*down": {}}, "meta": {}}, packing("gptq")),
        (compressed(), packing("compressed-tensors")),
        (compressed(weights(strategy="channel", group_size=None)), packing("compressed-tensors", 4, -1)),
        (compressed(weights(num_bits=8, group_size=32)), packing("compressed-tensors", 8, 32)),
        (compressed(SCHEME, SCHEME | {"targets": ["re:.*q_proj"]}), packing("compressed-tensors")),
        (compressed(sparsity_config={"format": "dense"}), packing("compressed-tensors")),
    ],
)
def test_read(config, expected):
    assert read_packing({"quantization_config": config}) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("awq", ["quantization_config='awq'", "JSON object"]),
        ({"quant_method": "bitsandbytes"}, ["quant_method='bitsandbytes'", "GGUF"]),
        ({}, ["quant_method=None"]),
        (AWQ | {"bits": 3}, ["bits=3", "GGUF"]),
        (AWQ | {"bits": 8}, ["bits=8"]),
        (AWQ | {"bits": True}, ["bits=True"]),
        (AWQ | {"version": "gemv"}, ["version='gemv'"]),
        (AWQ | {"version": "marlin"}, ["version='marlin'"]),
        (AWQ | {"backend": "llm-awq"}, ["backend='llm-awq'"]),
        (AWQ | {"group_size": 16}, ["group_size=16", "multiple of 32"]),
        (AWQ | {"group_size": "128"}, ["group_size='128'"]),
        (GPTQ | {"bits": 3}, ["bits=3"]),
        (GPTQ | {"bits": None}, ["bits=None"]),
        (GPTQ | {"group_size": 0}, ["group_size=0"]),
        (GPTQ | {"checkpoint_format": "marlin"}, ["checkpoint_format='marlin'"]),
        (GPTQ | {"is_marlin_format": True}, ["is_marlin_format=True"]),
        (GPTQ | {"pack_dtype": "int16"}, ["pack_dtype='int16'"]),
        (GPTQ | {"dynamic": {"-:a": {}, "+:b": {"bits": 8}}}, ["dynamic=", "+:b"]),
        (compressed(format="int-quantized"), ["format='int-quantized'"]),
        (compressed(kv_cache_scheme={"num_bits": 8}), ["kv_cache_scheme="]),
        (compressed(transform_config={"config_groups": {"u": {}}}), ["transform_config="]),
        (compressed(sparsity_config={"format": "sparse-24"}), ["sparsity_config="]),
        (compressed(config_groups={}), ["config_groups={}"]),
        (compressed(SCHEME | {"input_activations": {"num_bits": 8}}), ["group_0.input_activations="]),
        (compressed(SCHEME | {"format": "marlin-24"}), ["group_0.format='marlin-24'"]),
        (compressed(SCHEME | {"weights": None}), ["group_0.weights=None"]),
        (compressed(weights(num_bits=3)), ["group_0.weights.num_bits=3"]),
        (compressed(weights(type="float")), ["weights.type='float'"]),
        (compressed(weights(dynamic=True)), ["weights.dynamic=True"]),
        (compressed(weights(strategy="block")), ["weights.strategy='block'"]),
        (compressed(weights(group_size=None)), ["weights.group_size=None"]),
        (compressed(SCHEME, weights(num_bits=8)), ["config_groups="]),
    ],
)
def test_refused(config, words):
    with pytest.raises(ModelLoadError) as caught:
        read_packing({"quantization_config": config})
    for word in words:
        assert word in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
KEYS = sorted({*AWQ, *GPTQ, *compressed(), "dynamic", "checkpoint_format", "is_marlin_format", "backend"})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([AWQ, GPTQ, compressed()]), st.dictionaries(st.sampled_from(KEYS), values))
def test_any_json_is_read_or_refused(base, fields):
    try:
        found = read_packing({"quantization_config": base | fields})
    except ModelLoadError:
        return
    assert found is None or (found.bits in (4, 8) and (found.group_size == -1 or found.group_size % 32 == 0))


# ---- files ----

NORM, HEAD = torch.ones(64), torch.ones(8, 64)


def opened(directory, layout, coded, group=32, **changed):
    """A file of a quantized linear `a.b` and others; `changed`: parts of it, None for none of that name."""
    parts = {
        f"a.b.{name}": torch.from_numpy(np.ascontiguousarray(v)) for name, v in coded.stored(layout).items()
    }
    tensors = {"a.b.bias": torch.zeros(coded.n), "a.norm.weight": NORM, "lm_head.weight": HEAD} | parts
    tensors |= {f"a.b.{name}": value for name, value in changed.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / "model.safetensors")
    stored = open_safetensors(directory)
    shift = 1 if layout == "gptq" else 0
    return PackedCheckpoint(stored, packing(layout, coded.bits, group, shift))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_shows_weights(layout, symmetric, tmp_path):
    coded = Coded(48, 96, 32, symmetric=symmetric)
    checkpoint = opened(tmp_path, layout, coded)
    assert set(checkpoint.names()) == {"a.b.weight", "a.b.bias", "a.norm.weight", "lm_head.weight"}
    view = checkpoint.tensor("a.b.weight")
    assert (view.dtype, view.shape, view.data.nbytes) == ("CODES", (48, 96), 48 * 96 // 2)
    coding = view.coding
    assert (coding.layout, coding.bits, coding.group, coding.group_index) == (layout, 4, 32, None)
    assert (coding.zeros is None) == symmetric
    assert (
        bytes(coding.scales)
        == coded.stored(layout)["weight_scale" if layout == "compressed-tensors" else "scales"].tobytes()
    )
    assert checkpoint.tensor("a.norm.weight").dtype == "F32"
    assert checkpoint.tensor("lm_head.weight").coding is None
    with pytest.raises(ModelLoadError, match=r"no tensor 'a\.c\.weight'"):
        checkpoint.tensor("a.c.weight")
    checkpoint.close()


def test_group_index(tmp_path):
    """Kept only where groups are no runs of columns."""
    index = np.random.default_rng(0).permutation(np.arange(96) // 32)
    view = opened(tmp_path, "gptq", Coded(48, 96, 32, index=index)).tensor("a.b.weight")
    assert np.frombuffer(view.coding.group_index, np.int32).tolist() == index.tolist()
    for changed in (torch.full((96,), 3, dtype=torch.int32), torch.full((96,), -1, dtype=torch.int32)):
        checkpoint = opened(tmp_path, "gptq", Coded(48, 96, 32), g_idx=changed)
        with pytest.raises(ModelLoadError, match=r"a\.b\.g_idx with groups .* of 3"):
            checkpoint.tensor("a.b.weight")
    assert (
        opened(tmp_path, "gptq", Coded(48, 96, 32), g_idx=None).tensor("a.b.weight").coding.group_index
        is None
    )


@pytest.mark.parametrize(
    ("layout", "changed", "message"),
    [
        ("awq", {"scales": None}, r"no tensor 'a\.b\.scales'"),
        ("gptq", {"scales": None}, r"no tensor 'a\.b\.scales'"),
        ("compressed-tensors", {"weight_scale": None}, r"no tensor 'a\.b\.weight_scale'"),
        ("compressed-tensors", {"weight_shape": None}, r"no tensor 'a\.b\.weight_shape'"),
        (
            "awq",
            {"scales": torch.ones(4, 48)},
            r"scales of shape \[4, 48\]; awq .* group_size=32 needs \[3, 48\]",
        ),
        ("gptq", {"qzeros": torch.ones(3, 5).int()}, r"qzeros of shape \[3, 5\].* needs \[3, 6\]"),
        ("gptq", {"g_idx": torch.ones(95).int()}, r"g_idx of shape \[95\].* needs \[96\]"),
        ("compressed-tensors", {"weight_packed": torch.ones(48, 11).int()}, r"needs \[48, 12\]"),
        ("compressed-tensors", {"weight_zero_point": torch.ones(48, 3).int()}, r"needs \[6, 3\]"),
        (
            "compressed-tensors",
            {"weight_zero_point": torch.ones(48, 3).char()},
            "of type I8.* supported: I32",
        ),
        ("compressed-tensors", {"weight_shape": torch.tensor([48])}, r"weight_shape=\[48\]"),
        ("compressed-tensors", {"weight_shape": torch.tensor([48, -1])}, r"weight_shape=\[48, -1\]"),
        ("awq", {"qweight": torch.ones(576).int()}, "two dimensions"),
        ("awq", {"qweight": torch.ones(96, 6)}, "qweight' of type F32.* supported: I32"),
        ("awq", {"qweight": torch.ones(90, 6).int()}, "90 input features, which are not groups of 32"),
        ("awq", {"weight": torch.ones(48, 96)}, r"a\.b\.weight and a\.b\.qweight"),
        ("awq", {"scales": torch.full((3, 48), 4097.0).half()}, "scales up to 4096.*above 4094"),
        ("awq", {"scales": torch.full((3, 48), 7e4).bfloat16()}, "scales up to 70144"),
        ("gptq", {"scales": torch.full((3, 48), float("nan"))}, "scales up to nan"),
        ("gptq", {"scales": torch.full((3, 48), float("inf")).half()}, "scales up to inf"),
        ("gptq", {"scales": torch.ones(3, 48).double()}, "scales' of type F64.* supported: BF16, F16, F32"),
    ],
)
def test_wrong_files_are_refused(layout, changed, message, tmp_path):
    with pytest.raises(ModelLoadError, match=message) as caught:
        opened(tmp_path, layout, Coded(48, 96, 32), **changed).tensor("a.b.weight")
    assert str(tmp_path) in str(caught.value)


def test_parts_without_codes_are_left_to_see(tmp_path):
    """A strict loader shall meet them."""
    assert "a.b.scales" in opened(tmp_path, "awq", Coded(48, 96, 32), qweight=None).names()


def test_load_spec_carries_it(tmp_path):
    from asyncengine.checkpoint.config import load_config, spec_from_config

    config = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 1, "num_attention_heads": 2, "quantization_config": AWQ,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert spec_from_config(load_config(tmp_path)).packing == packing("awq")
