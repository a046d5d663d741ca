"""Loading: strict both ways, before anything is copied; types; dummy weights."""

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncengine.checkpoint.sharding import Shard
from asyncengine.checkpoint.tensor import TensorView
from asyncengine.errors import ModelLoadError, OutOfMemoryError
from asyncengine.worker.load import DummyCheckpoint, check_weights
from asyncengine.worker.models.decoder import Decoder
from asyncengine.worker.models.registry import build_model

from .tiny import Started, assert_greedy, make_model, prompt, reference_logits, spec_of


class FakeCheckpoint:
    """Shapes without data."""

    def __init__(self, shapes):
        self.shapes = shapes

    def names(self):
        return self.shapes.keys()

    def tensor(self, name):
        return TensorView(name, "F32", self.shapes[name], memoryview(b""))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = make_model("Llama")
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    return model, directory, load_file(directory / "model.safetensors")


def refusal(spec, shapes):
    with pytest.raises(ModelLoadError) as caught:
        check_weights(Decoder(spec, Shard()), FakeCheckpoint(shapes))
    return str(caught.value)


def test_names_and_shapes_are_checked_first(saved):
    _, directory, tensors = saved
    spec = spec_of(directory)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    down = "model.layers.1.mlp.down_proj.weight"

    assert f"lacks tensor {down}," in refusal(spec, {n: s for n, s in shapes.items() if n != down})
    message = refusal(spec, {n: s for n, s in shapes.items() if ".layers.2." not in n})
    assert message.count("model.layers.2.") == 5 and "(9 in all)" in message
    message = refusal(spec, shapes | {"model.layers.0.self_attn.q_proj.bias": (64,)})
    assert "has tensor model.layers.0.self_attn.q_proj.bias," in message
    message = refusal(spec, shapes | {down: (64, 97)})
    assert f"{down} has shape [64, 97], the configuration needs [64, 96]" in message


def test_harmless_extras_are_passed_over(saved, tmp_path):
    model = make_model("Llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with Started(spec_of(tmp_path), tmp_path) as started:
        assert_greedy(model, prompt(9), started.driver().generate({0: prompt(9)}, 3)[0])

    tensors["lm_head.weight"] = torch.zeros(300, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight has shape \[300, 64\]"):
        Started(spec_of(tmp_path), tmp_path)


def test_progress_counts_the_checkpoint(saved):
    _, directory, tensors = saved
    with Started(spec_of(directory), directory) as started:
        steps = [entry[1:] for entry in started.progress if entry[0] == "load"]
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert all(entry[1:] == (total, "bytes") for entry in steps)
    assert steps[-1][0] == total and sorted(steps) == steps
    assert total <= started.loaded.weight_bytes < 1.5 * total


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float16])
def test_stored_types(saved, tmp_path, stored):
    _, directory, tensors = saved
    save_file({name: tensor.to(stored) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    rounded = make_model("Llama")
    rounded.load_state_dict({name: tensor.to(stored).float() for name, tensor in tensors.items()})
    with Started(spec_of(directory), tmp_path) as started:
        started.driver().generate({0: prompt(20)}, 1, logprobs=0)
        np.testing.assert_allclose(started.logits(1)[0], reference_logits(rounded, prompt(20))[-1], atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_held_types(saved, dtype):
    """Weights rounded to 8 (11) bits of mantissa, activations float32: far closer than all in bfloat16."""
    _, directory, tensors = saved
    rounded = make_model("Llama")
    state = {n: t if "norm" in n else t.to(getattr(torch, dtype)).float() for n, t in tensors.items()}
    rounded.load_state_dict(state)
    # A CPU that multiplies in bfloat16 rounds the activations too.
    tolerance = 0.15 if dtype == "bfloat16" else 1e-4
    with Started(spec_of(directory), directory, dtype=dtype) as started:
        started.driver().generate({0: prompt(20)}, 1, logprobs=0)
        logits = started.logits(1)[0]
    np.testing.assert_allclose(logits, reference_logits(rounded, prompt(20))[-1], atol=tolerance)
    assert started.loaded.weight_bytes < 0.6 * sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("bfloat16", 0.25), ("float16", 0.03)])
def test_kv_types(saved, kv_dtype, tolerance):
    model, directory, _ = saved
    with Started(spec_of(directory), directory, kv_dtype=kv_dtype) as started:
        started.driver().generate({0: prompt(40)}, 1, logprobs=0)
        error = np.abs(started.logits(1)[0] - reference_logits(model, prompt(40))[-1])
        assert 0 < error.max() < tolerance
        assert started.allocated.kv_bytes == 200 * 2 * 3 * 2 * 4 * 16 * 2


@pytest.mark.parametrize(("size", "tolerance"), [(0, 0.06), (300, 0.3)])
def test_an_int8_cache_and_a_bias_of_keys(tmp_path, size, tolerance):
    """In some models a few dimensions of keys are far beyond the others, nearly the same at all positions."""
    model = make_model("Qwen2", seed=1)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias.view(2, 16)
            bias[:, 6:8] += size  # of the pairs that turn slowest
            bias[0, 15] -= size
    model.save_pretrained(tmp_path)
    with Started(spec_of(tmp_path), tmp_path, kv_dtype="int8") as started:
        started.driver().generate({0: prompt(40)}, 1, logprobs=0)
        error = np.abs(started.logits(1)[0] - reference_logits(model, prompt(40))[-1])
    assert 0 < error.max() < tolerance


def test_weights_that_cannot_fit_are_refused_with_the_sums(saved, monkeypatch):
    monkeypatch.setattr("asyncengine.worker.ops.cpu_backend.available_bytes", lambda: 1000)
    with pytest.raises(
        OutOfMemoryError, match=r"take [\d,]+ bytes as float32 on each rank, and 1,000 are free"
    ):
        Started(spec_of(saved[1]), saved[1])


def test_unknown_architecture(saved):
    spec = spec_of(saved[1])
    with pytest.raises(
        ModelLoadError, match="'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM"
    ):
        build_model(msgspec.structs.replace(spec, architecture="GPT2LMHeadModel"), Shard())


def test_dummy_weights(saved):
    spec = spec_of(saved[1])
    whole, part = (DummyCheckpoint(Decoder(spec, shard), 7) for shard in (Shard(), Shard(1, 2)))
    name = "model.layers.0.mlp.up_proj.weight"
    values = np.frombuffer(whole.tensor(name).data, np.float16).astype(np.float32)
    assert values.size == 96 * 64 and abs(values.std() - 0.02) < 0.001 and abs(values.mean()) < 0.002
    for name in whole.names():
        assert bytes(whole.tensor(name).data) == bytes(part.tensor(name).data)
    assert bytes(whole.tensor(name).data) != bytes(
        DummyCheckpoint(Decoder(spec, Shard()), 8).tensor(name).data
    )
    with Started(spec, "", load_format="dummy") as started:
        tokens = started.driver().generate({0: prompt(9)}, 5)[0]
        assert all(0 <= token < spec.vocab_size for token in tokens)
