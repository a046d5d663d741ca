"""The decoder-only transformer that Llama, Mistral, Qwen2 and Qwen3 share.

They differ in what `ModelSpec` says: biases, per-head norms of q and k, sliding windows, tied head.
"""

from collections.abc import Iterator
from typing import TypeVar

from ...checkpoint.sharding import Shard
from ...checkpoint.spec import ModelSpec
from ..ops.interface import Ops
from .parameters import Embedding, Linear, Parameter, Source, Vector

__all__ = ["Decoder"]

T = TypeVar("T")


class Decoder:
    """One rank's part of the model."""

    def __init__(self, spec: ModelSpec, shard: Shard) -> None:
        self.spec = spec
        self.vocab = shard.part(spec.vocab_size)
        table = Source("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size), self.vocab)
        self.embed = Embedding(table)
        self.layers = [_Layer(spec, shard, index) for index in range(spec.num_layers)]
        self.norm = _norm("model.norm.weight", spec.hidden_size)
        head = table if spec.tie_embeddings else table._replace(name="lm_head.weight")
        self.head = Linear((head,), is_head=True)

    def parameters(self) -> Iterator[Parameter]:
        """All declarations, in the order of their use."""
        yield self.embed
        for layer in self.layers:
            yield from layer.parameters()
        yield self.norm
        yield self.head

    def forward(self, ops: Ops[T]) -> T:
        """Logits of the rows that are sampled from, [samples, vocabulary]."""
        residual = ops.all_reduce(ops.embed(self.embed))
        for index, layer in enumerate(self.layers):
            layer.attend(ops, residual, index)
            if layer is self.layers[-1]:  # the rest attends to nothing: only sampled rows need it
                residual = ops.select(residual)
            layer.transform(ops, residual)
        h = ops.rms_norm(residual, self.norm)
        return ops.head(h, self.head, self.spec.vocab_size, self.vocab.start)


class _Layer:
    def __init__(self, spec: ModelSpec, shard: Shard, index: int) -> None:
        prefix = f"model.layers.{index}."
        hidden, head_dim = spec.hidden_size, spec.head_dim
        heads = _scale(shard.part(spec.num_heads), head_dim)
        kv_heads = _scale(shard.kv_heads(spec.num_kv_heads), head_dim)
        features = shard.part(spec.intermediate_size)
        kv_size = spec.num_kv_heads * head_dim

        self.window = spec.sliding_windows[index]
        self.input_norm = _norm(prefix + "input_layernorm.weight", hidden)
        self.mlp_norm = _norm(prefix + "post_attention_layernorm.weight", hidden)
        self.q_norm = _norm(prefix + "self_attn.q_norm.weight", head_dim) if spec.qk_norm else None
        self.k_norm = _norm(prefix + "self_attn.k_norm.weight", head_dim) if spec.qk_norm else None
        self.qkv = _columns(
            hidden,
            spec.qkv_bias,
            (prefix + "self_attn.q_proj", spec.num_heads * head_dim, heads),
            (prefix + "self_attn.k_proj", kv_size, kv_heads),
            (prefix + "self_attn.v_proj", kv_size, kv_heads),
        )
        self.output = _rows(
            prefix + "self_attn.o_proj", hidden, spec.num_heads * head_dim, heads, spec.output_bias, shard
        )
        self.gate_up = _columns(
            hidden,
            spec.mlp_bias,
            (prefix + "mlp.gate_proj", spec.intermediate_size, features),
            (prefix + "mlp.up_proj", spec.intermediate_size, features),
            is_gated=True,
        )
        self.down = _rows(
            prefix + "mlp.down_proj", hidden, spec.intermediate_size, features, spec.mlp_bias, shard
        )

    def attend(self, ops: Ops[T], residual: T, index: int) -> None:
        qkv = ops.linear(ops.rms_norm(residual, self.input_norm), self.qkv)
        ops.rope_kv(qkv, index, self.q_norm, self.k_norm)
        ops.add_linear(residual, ops.attention(qkv, index, self.window), self.output)

    def transform(self, ops: Ops[T], residual: T) -> None:
        h = ops.gated_linear(ops.rms_norm(residual, self.mlp_norm), self.gate_up)
        ops.add_linear(residual, h, self.down)

    def parameters(self) -> Iterator[Parameter]:
        yield self.input_norm
        yield self.qkv
        if self.q_norm is not None and self.k_norm is not None:
            yield self.q_norm
            yield self.k_norm
        yield self.output
        yield self.mlp_norm
        yield self.gate_up
        yield self.down


def _norm(name: str, size: int) -> Vector:
    return Vector(Source(name, (size,), range(size)))


def _columns(inputs: int, bias: bool, *parts: tuple[str, int, range], is_gated: bool = False) -> Linear:
    """Column parallel: every rank computes some of the outputs of each part (name, outputs, own)."""
    weights = tuple(Source(f"{name}.weight", (outputs, inputs), own) for name, outputs, own in parts)
    biases = tuple(Source(f"{name}.bias", (outputs,), own) for name, outputs, own in parts)
    return Linear(weights, biases if bias else (), is_gated=is_gated)


def _rows(name: str, outputs: int, inputs: int, own: range, bias: bool, shard: Shard) -> Linear:
    """Row parallel: every rank has some of the inputs; the outputs are sums over ranks.

    The bias is part of the sum once: ranks after the first take no row of it.
    """
    weight = Source(f"{name}.weight", (outputs, inputs), range(outputs), own if shard.world > 1 else None)
    biases = (Source(f"{name}.bias", (outputs,), range(outputs if shard.rank == 0 else 0)),)
    return Linear((weight,), biases if bias else ())


def _scale(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
