"""Weights on the device: every rank's part of every tensor, whatever its stored type."""

import gguf
import numpy as np
import pytest
import torch

from asyncengine.checkpoint.sharding import Shard
from asyncengine.checkpoint.tensor import TensorView
from asyncengine.worker.cuda import weights as module
from asyncengine.worker.cuda.device import HostDevice
from asyncengine.worker.cuda.weights import Weights
from asyncengine.worker.load import sources_of
from asyncengine.worker.models.decoder import Decoder
from asyncengine.worker.models.parameters import Embedding, Linear

from .test_rope import make_spec

STORED = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def spec(**fields):
    sizes = dict(
        vocab_size=211, hidden_size=256, intermediate_size=512, num_layers=1, num_heads=4, num_kv_heads=2,
        head_dim=64, qkv_bias=True, mlp_bias=True, output_bias=True, sliding_windows=(0,),
    )  # fmt: skip
    return make_spec("default", **(sizes | fields))


def checkpoint(model, stored):
    """(tensors as they are stored, their values), by name."""
    rng = np.random.default_rng(1)
    views, values = {}, {}
    for source in {s.name: s for p in model.parameters() for s in sources_of(p)}.values():
        x = rng.normal(size=source.shape).astype(np.float32)
        kind = stored if len(source.shape) == 2 or stored in STORED else "F32"
        if kind in STORED:
            data = x.astype(STORED[kind])
            values[source.name] = data.astype(np.float32)
        elif kind == "BF16":
            data = torch.from_numpy(x).bfloat16()
            values[source.name] = data.float().numpy()
            data = data.view(torch.int16).numpy()
        else:
            type_ = gguf.GGMLQuantizationType[kind]
            data = gguf.quantize(x, type_)
            values[source.name] = gguf.dequantize(data, type_)
        views[source.name] = TensorView(source.name, kind, source.shape, data.reshape(-1).view(np.uint8).data)
    return views, values


def loaded(model, views, dtype):
    parameters = list(model.parameters())
    weights = Weights(HostDevice(), parameters, dtype, 2)
    for parameter in parameters:
        weights.put(parameter, views.__getitem__)
    weights.finish()
    assert weights.nbytes == weights.expected_bytes
    return weights


def part(values, source):
    rows = values[source.name][source.rows.start : source.rows.stop]
    return rows if source.columns is None else rows[:, source.columns.start : source.columns.stop]


@pytest.mark.parametrize("staging", [1 << 20, 4096])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("F32", "float32"),
        ("F64", "bfloat16"),
        ("F16", "float16"),
        ("BF16", "bfloat16"),
        ("Q8_0", "float32"),
        ("Q5_1", "bfloat16"),
    ],
)
def test_parts_are_those_of_the_rank(stored, dtype, world, staging, monkeypatch):
    monkeypatch.setattr(module, "STAGING_BYTES", staging)
    whole, kind = Decoder(spec(), Shard()), getattr(torch, dtype)
    views, values = checkpoint(whole, stored)
    for rank in range(world):
        model = Decoder(spec(), Shard(rank, world))
        weights = loaded(model, views, dtype)

        def expected(sources, to=kind):
            return torch.from_numpy(np.concatenate([part(values, source) for source in sources])).to(to)

        for parameter in model.parameters():
            if isinstance(parameter, Linear):
                matrix, bias = weights.linear(parameter)
                assert torch.equal(matrix, expected(parameter.sources))
                if any(len(source.rows) for source in parameter.biases):
                    assert torch.equal(bias, expected(parameter.biases))
                else:
                    assert bias is None
            elif isinstance(parameter, Embedding):
                assert torch.equal(weights.table(parameter), expected([parameter.source]))
            else:
                vector = weights.vector(parameter)
                assert vector.dtype == torch.float32
                assert torch.equal(vector, expected([parameter.source], torch.float32))


def test_a_tied_table_is_stored_once():
    model = Decoder(spec(tie_embeddings=True), Shard())
    weights = loaded(model, checkpoint(model, "F32")[0], "float32")
    assert weights.table(model.embed).data_ptr() == weights.linear(model.head)[0].data_ptr()
