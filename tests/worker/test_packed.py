"""AWQ, GPTQ and compressed-tensors: logits against transformers with the weights that the codes stand for."""

import os

import numpy as np
import pytest
import torch

from asyncengine._fast.cpu import Comm
from asyncengine.checkpoint.sharding import comm_region_bytes
from asyncengine.errors import ConfigError, ModelLoadError

from ..codes import LAYOUTS
from .packed import Packed
from .plans import decode_result
from .ranks import recording, run_ranks
from .test_quantization import distance, logits_of, with_rounded_inputs
from .tiny import Started, prompt, reference_logits, spec_of, worker_config

WIDE = dict(hidden_size=128, intermediate_size=384, tie_word_embeddings=False)
CASES = [
    # layout, architecture, group, bits, group of the engine, fields
    *((layout, "Llama", 32, 4, 32, dict(symmetric=symmetric)) for layout in LAYOUTS for symmetric in (0, 1)),
    *((layout, "Qwen2", 128, 4, 128, dict(tie_word_embeddings=True)) for layout in LAYOUTS),  # biases
    *((layout, "Qwen3", -1, 4, 128, dict(symmetric=True, head_dim=64)) for layout in LAYOUTS),
    *((layout, "Llama", 64, 8, 64, dict(attention_bias=True)) for layout in LAYOUTS[1:]),
    ("gptq", "Llama", 128, 8, 128, dict(symmetric=True)),
    ("compressed-tensors", "Llama", -1, 8, 128, dict(symmetric=True, bfloat16=True)),
    ("compressed-tensors", "Llama", 32, 4, 32, dict(bfloat16=True)),
    ("gptq", "Mistral", 64, 4, 64, dict(shift=0, extra={"checkpoint_format": "gptq_v2"})),
    ("gptq", "Mistral", 64, 4, 64, dict(skip=["layers.1.", "down_proj"], extra={"dynamic": {"-:down": {}}})),
    ("awq", "Mistral", 96, 4, 32, dict(skip=["o_proj"], extra={"modules_to_not_convert": ["o_proj"]})),
]


def made(layout, architecture, group, bits, fields):
    sizes = WIDE | ({"hidden_size": 192} if group == 96 else {})
    return Packed(architecture, layout, group, bits, **(sizes | fields))


@pytest.mark.parametrize(
    ("layout", "architecture", "group", "bits", "kept", "fields"),
    CASES,
    ids=["-".join(map(str, case[:4])) + "-" + "-".join(case[5]) for case in CASES],
)
def test_codes_stay(layout, architecture, group, bits, kept, fields, tmp_path):
    packed = made(layout, architecture, group, bits, fields)
    packed.save(tmp_path)
    exact = reference_logits(packed.model, prompt(40))[-1]
    quantized = [packed.model.get_submodule(name) for name in packed.coded]
    with Started(spec_of(tmp_path), tmp_path, quantization=layout, dtype="float16") as started:
        assert started.runner.backend._weights.group == kept
        logits = logits_of(started, prompt(40))
        codes = sum(module.weight.numel() for module in quantized)
        plain = sum(p.numel() for p in packed.model.parameters()) - codes
        # Codes, and at most a scale and a minimum for every group; heads may have columns beside them.
        assert started.loaded.weight_bytes < codes * (bits / 8 + 4 / kept) + plain * 2.2 + 20000
    # What is left is the rounding of minima, and of activations: the latter tells ten times as much.
    assert distance(logits, exact) < 0.2
    minima = packed.with_rounded_minima()
    assert distance(reference_logits(minima, prompt(40))[-1], exact) < 0.01
    rounded = with_rounded_inputs(minima, kept, set(packed.coded))
    assert distance(logits, reference_logits(rounded, prompt(40))[-1]) < 0.02


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantized(layout, tmp_path):
    """Under a dtype: exactly the weights that the codes stand for."""
    packed = Packed("Qwen2", layout, 64, **WIDE)
    packed.save(tmp_path)
    exact = reference_logits(packed.model, prompt(40))[-1]
    with Started(spec_of(tmp_path), tmp_path, dtype="float32") as started:
        np.testing.assert_allclose(logits_of(started, prompt(40)), exact, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("quantization", "limit"), [("int8", 0.2), ("int4", 1.0)])
def test_other_quantizations(layout, quantization, limit, tmp_path):
    """Both make codes of their own from those that are stored."""
    packed = Packed("Llama", layout, 128, **WIDE)
    packed.save(tmp_path)
    with Started(spec_of(tmp_path), tmp_path, quantization=quantization) as started:
        assert (
            distance(logits_of(started, prompt(40)), reference_logits(packed.model, prompt(40))[-1]) < limit
        )


def test_scattered_groups(tmp_path):
    """desc_act: refused as stored, exact when dequantized, and no matter with one group for all."""
    packed = Packed("Llama", "gptq", 32, indexed=["down_proj"], extra={"desc_act": True}, **WIDE)
    packed.save(tmp_path)
    with pytest.raises(
        ModelLoadError, match=r"layers\.0\.mlp\.down_proj\.weight has groups.*dtype='bfloat16'"
    ):
        Started(spec_of(tmp_path), tmp_path, quantization="gptq")
    exact = reference_logits(packed.model, prompt(40))[-1]
    with Started(spec_of(tmp_path), tmp_path) as started:
        np.testing.assert_allclose(logits_of(started, prompt(40)), exact, rtol=1e-4, atol=2e-4)
    with Started(spec_of(tmp_path), tmp_path, quantization="int8") as started:
        assert distance(logits_of(started, prompt(40)), exact) < 0.2

    whole = Packed("Llama", "gptq", -1, indexed=["_proj"], extra={"desc_act": True}, **WIDE)
    whole.save(tmp_path)
    with Started(spec_of(tmp_path), tmp_path, quantization="gptq") as started:
        exact = reference_logits(whole.model, prompt(40))[-1]
        assert distance(logits_of(started, prompt(40)), exact) < 0.2


def test_eager_threads_and_sleep_change_nothing(tmp_path):
    Packed("Llama", "awq", 64, **WIDE).save(tmp_path)
    runs = []
    for fields in ({}, {"enforce_eager": True}, {"num_threads": 1}):
        with Started(spec_of(tmp_path), tmp_path, quantization="awq", **fields) as started:
            runs.append(logits_of(started, prompt(40)))
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_quantized_head(tmp_path):
    """GPTQ with `lm_head` true; in the file stands what counts."""
    ends = ("_proj", "lm_head")
    packed = Packed("Llama", "gptq", 32, ends=ends, extra={"lm_head": True}, vocab_size=216, **WIDE)
    packed.save(tmp_path)
    with Started(spec_of(tmp_path), tmp_path, quantization="gptq") as started:
        exact = reference_logits(packed.model, prompt(40))[-1]
        assert distance(logits_of(started, prompt(40)), exact) < 0.2


@pytest.mark.parametrize(("layout", "group"), [("awq", 128), ("gptq", 64), ("compressed-tensors", -1)])
def test_ranks(layout, group, tmp_path):
    """Two ranks take 192 of 384 features of `down`: half a group of 128."""
    packed = Packed("Llama", layout, group, symmetric=group == -1, **WIDE)
    packed.save(tmp_path)
    config = worker_config(spec_of(tmp_path), tmp_path, quantization=layout, dtype="float16", num_threads=1)
    plans, single = [], []
    with Started(spec_of(tmp_path), tmp_path, quantization=layout, dtype="float16") as started:
        driver = recording(started, plans, single)
        driver.generate({0: prompt(20)}, 1)
        whole = started.loaded.weight_bytes
    fd = os.memfd_create("comm")
    try:
        os.ftruncate(fd, Comm.bytes_needed(2, comm_region_bytes(config.spec)))
        weights, (first, _) = run_ranks("rank.py", fd, config, plans, 2, tmp_path, 60)
    finally:
        os.close(fd)
    assert [decode_result(r).tokens for r in first] == [decode_result(r).tokens for r in single]
    assert max(weights) < 0.75 * whole


def test_ranks_that_cut_through_groups(tmp_path):
    packed = Packed("Llama", "awq", 96, **(WIDE | {"hidden_size": 96, "intermediate_size": 288}))
    packed.save(tmp_path)
    fd = os.memfd_create("comm")
    try:
        os.ftruncate(fd, Comm.bytes_needed(2, comm_region_bytes(spec_of(tmp_path))))
        with pytest.raises(ConfigError, match=r"144 of the 288 input features.*fewer ranks") as caught:
            Started(spec_of(tmp_path), tmp_path, quantization="awq", world=2, fds={"comm": fd})
    finally:
        os.close(fd)
    assert caught.value.parameter == "tensor_parallel_size"


def test_biases_of_zeros(tmp_path):
    """Written for every quantized linear by some tools. Others are not ignored."""
    packed = Packed("Llama", "gptq", 32, **WIDE)
    zeros = {f"{name}.bias": torch.zeros(coded.n).half() for name, coded in packed.coded.items()}
    packed.save(tmp_path, **zeros)
    with Started(spec_of(tmp_path), tmp_path, quantization="gptq") as started:
        tokens = started.driver().generate({0: prompt(20)}, 1)[0]
        assert len(tokens) == 1
    name = "model.layers.0.mlp.up_proj.bias"
    packed.save(tmp_path, **(zeros | {name: zeros[name] + 1}))
    with pytest.raises(ModelLoadError, match=f"has tensor {name},"):
        Started(spec_of(tmp_path), tmp_path, quantization="gptq")
