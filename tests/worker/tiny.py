"""Tiny random checkpoints made and judged by transformers, and runners on them."""

import msgspec
import numpy as np
import torch
import transformers

from asyncengine.checkpoint.config import load_config, spec_from_config
from asyncengine.wire.stages import Allocate, Allocated, Captured, Loaded, Profiled, WorkerConfig
from asyncengine.worker.runner import Runner

from .plans import Driver

SIZES = dict(
    vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip


def make_model(architecture, seed=0, **fields):
    """A random model with weights large enough that its distribution is far from flat."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, f"{architecture}ForCausalLM")
    config = model_class.config_class(**(SIZES | {"attn_implementation": "eager"} | fields))
    model = model_class(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 0.15)
    return model


def reference_logits(model, ids):
    """[len(ids), vocabulary]"""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def assert_greedy(model, ids, tokens):
    """`tokens` is the greedy continuation of `ids`: each is the reference's choice after those before."""
    expected = reference_logits(model, ids + tokens)[len(ids) - 1 : -1].argmax(axis=1)
    assert tokens == expected.tolist()


def worker_config(spec, weights, **fields):
    defaults = dict(
        load_format="safetensors", device="cpu", dtype="float32", quantization=None, kv_dtype="float32",
        block_size=4,
        max_model_len=160, max_num_seqs=8, max_num_batched_tokens=128, max_num_samples=24, max_logprobs=20,
        num_threads=2, enforce_eager=False, seed=0,
    )  # fmt: skip
    return WorkerConfig(spec=spec, weights=str(weights), **(defaults | fields))


def spec_of(directory):
    return spec_from_config(load_config(directory))


class Started:
    """A single-rank runner that has gone through all stages."""

    def __init__(self, spec, weights, num_blocks=200, rank=0, world=1, fds=None, **fields):
        self.config = worker_config(spec, weights, **fields)
        self.num_blocks = num_blocks
        self.progress = []
        self.runner = self.make_runner(rank, world, fds or {})
        self.stage("config", msgspec.msgpack.encode(self.config))
        self.loaded = msgspec.msgpack.decode(self.stage("load"), type=Loaded)
        self.profiled = msgspec.msgpack.decode(self.stage("profile"), type=Profiled)
        allocate = msgspec.msgpack.encode(Allocate(num_blocks))
        self.allocated = msgspec.msgpack.decode(self.stage("allocate", allocate), type=Allocated)
        self.captured = msgspec.msgpack.decode(self.stage("capture"), type=Captured)

    def make_runner(self, rank, world, fds):
        return Runner(rank, world, fds)

    def stage(self, name, payload=b""):
        return self.runner.run_stage(name, payload, lambda *args: self.progress.append((name, *args)))

    def driver(self):
        return Driver(self.runner.step, self.num_blocks, self.config.block_size)

    def logits(self, rows):
        """Those of the last step, [rows, vocabulary]."""
        return np.array(self.runner.backend.logits[:rows])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.runner.close()


def prompt(length, vocab=211):
    return np.random.default_rng(length).integers(3, vocab, length).tolist()
