"""Quantized weights: the model's logits against transformers' with weights rounded by the definition."""

import numpy as np
import pytest
import torch

from asyncengine.checkpoint.gguf import GGUFFile
from asyncengine.checkpoint.gguf_spec import spec_from_gguf

from ..cpu.test_whole_rows import norm_of, rotation, rounded_in_groups
from .test_demo import reference
from .tiny import Started, make_model, prompt, reference_logits, spec_of

WHOLE = 0
"""In place of a group: rows are rotated, and have one scale each."""
NUMBERS = list(range(700, 750))


def rounded_to_8_bits(x, group):
    """Symmetric: `max|x| / 127` for every row and `group` columns."""
    if group == WHOLE:
        turn = rotation(x.shape[1]) / np.sqrt(norm_of(x.shape[1]))
        return (rounded_to_8_bits(x @ turn, x.shape[1]) @ turn).astype(np.float32)
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(len(x), -1, group)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    scale = (largest / 127).astype(np.float32)
    codes = np.clip(np.round(groups / np.where(scale == 0, 1, scale)), -127, 127)
    return (codes * scale).reshape(len(x), -1)[:, : x.shape[1]]


def rounded_to_4_bits(x):
    """Rotated, every 32 columns with 16 codes from the least value to the largest."""
    turn = rotation(x.shape[1]) / np.sqrt(norm_of(x.shape[1]))
    return (rounded_in_groups(x @ turn) @ turn).astype(np.float32)


def with_rounded_inputs(model, group, names=None):
    """The model, made to round the inputs of its linears, or those of `names`, as the engine does."""

    def round_input(module, inputs):
        flat = inputs[0].reshape(-1, inputs[0].shape[-1])
        return torch.from_numpy(rounded_to_8_bits(flat.numpy(), group)).reshape(inputs[0].shape)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (names is None or name in names):
            module.register_forward_pre_hook(round_input)
    return model


def distance(logits, reference):
    """Of two rows of logits, by what matters of them: mean absolute difference of the log-probabilities."""
    ours, theirs = (torch.log_softmax(torch.from_numpy(np.float64(x)), 0) for x in (logits, reference))
    return float((ours - theirs).abs().mean())


@pytest.fixture(scope="module", params=["Llama", "Qwen2"])
def saved(request, tmp_path_factory):
    model = make_model(request.param, hidden_size=128, intermediate_size=352, tie_word_embeddings=False)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return model, directory


def logits_of(started, ids):
    started.driver().generate({0: ids}, 1, logprobs=0)
    return started.logits(1)[0]


def test_int8(saved):
    model, directory = saved
    rounded = with_rounded_inputs(type(model)(model.config).eval(), WHOLE)
    state = {
        name: torch.from_numpy(rounded_to_8_bits(tensor.numpy(), WHOLE)) if tensor.ndim == 2 else tensor
        for name, tensor in model.state_dict().items()
    }
    rounded.load_state_dict(state)
    with Started(spec_of(directory), directory, quantization="int8") as started:
        logits = logits_of(started, prompt(40))
        # The same roundings; a value at the edge of two codes may fall either way.
        assert distance(logits, reference_logits(rounded, prompt(40))[-1]) < 0.02
        assert distance(logits, reference_logits(model, prompt(40))[-1]) < 0.2
        assert started.loaded.weight_bytes < 0.3 * 4 * sum(p.numel() for p in model.parameters())


def test_int4(saved):
    """As accurate as codes of which each group chose its own range; head and table have 8 bits."""
    model, directory = saved
    rounded = type(model)(model.config).eval()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, weight in state.items():
        if weight.ndim == 2:
            is_linear = name.endswith("_proj.weight")
            state[name] = rounded_to_4_bits(weight) if is_linear else rounded_to_8_bits(weight, WHOLE)
    rounded.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    exact = reference_logits(model, prompt(40))[-1]
    with Started(spec_of(directory), directory, quantization="int4") as started:
        error = distance(reference_logits(rounded, prompt(40))[-1], exact)
        assert distance(logits_of(started, prompt(40)), exact) < 1.3 * error
        assert started.loaded.weight_bytes < 0.21 * 4 * sum(p.numel() for p in model.parameters())


def test_eager_is_the_same(saved):
    _, directory = saved
    runs = []
    for eager in (False, True):
        with Started(spec_of(directory), directory, quantization="int4", enforce_eager=eager) as started:
            runs.append(logits_of(started, prompt(40)))
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_batch_chunks_and_threads_change_nothing(saved, quantization):
    _, directory = saved
    with Started(spec_of(directory), directory, quantization=quantization) as started:
        alone = started.driver().generate({0: prompt(50)}, 6)[0]
        chunked = started.driver().generate({0: prompt(50), 1: prompt(33), 2: prompt(5)}, 6, chunk=7)[0]
        logits = logits_of(started, prompt(50))
    with Started(spec_of(directory), directory, quantization=quantization, num_threads=1) as started:
        np.testing.assert_array_equal(logits_of(started, prompt(50)), logits)
    assert alone == chunked


def test_gguf_stays_as_stored(demo_gguf):
    """The codes are the file's own: only the activations' rounding is not in the reference."""
    file = GGUFFile(demo_gguf)
    model, spec = reference(file), spec_from_gguf(file)
    vocabulary = {token: index for index, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    france = [vocabulary[token] for token in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]
    plain = [reference_logits(model, ids)[-1] for ids in (france, NUMBERS)]
    rounded = with_rounded_inputs(model, 32)
    options = dict(load_format="gguf", max_model_len=256, block_size=16, quantization="gguf")
    with Started(spec, demo_gguf, **options) as started:
        assert started.driver().generate({0: france}, 1)[0] == [vocabulary["ĠParis"]]
        # Thirty layers amplify a code that falls the other way: compare the sizes of the errors.
        for ids, exact in zip((france, NUMBERS), plain, strict=True):
            error = distance(reference_logits(rounded, ids)[-1], exact)
            assert distance(logits_of(started, ids), exact) < 0.02 + 2 * error
        stored = sum(file.tensor(name).data.nbytes for name in file.names())
        assert started.loaded.weight_bytes < 1.03 * stored
