"""A model's operations on torch tensors: our kernels, and cuBLAS for products of matrices.

Everything is launched as the model's forward calls it; a graph records the launches. Activations have the
engine's dtype.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from asyncengine.kernels.activation import gated
from asyncengine.kernels.paged_attention import AttentionWorkspace, paged_attention
from asyncengine.kernels.rms_norm import rms_norm
from asyncengine.kernels.rope_kv import rope_kv

from ...checkpoint.sharding import Shard
from ...checkpoint.spec import ModelSpec
from ..models.parameters import Embedding, Linear, Vector
from .batch import Step
from .group import Group
from .kv_cache import KVCache
from .offload import Offload
from .weights import Weights

__all__ = ["CudaOps", "Fixtures"]


class Fixtures(NamedTuple):
    """What all steps of an engine share."""

    spec: ModelSpec
    shard: Shard
    weights: Weights | Offload
    rope: torch.Tensor
    """float32 [positions, head size]"""
    block_table: torch.Tensor
    workspace: AttentionWorkspace
    group: Group | None
    """None: there is one rank."""


class CudaOps:
    """`Ops` of torch tensors, for one step."""

    def __init__(self, fixtures: Fixtures, cache: KVCache, step: Step) -> None:
        self._fixed = fixtures
        self._weights = fixtures.weights
        self._eps = fixtures.spec.norm_eps
        self._group = fixtures.group
        self._cache = cache
        self._step = step

    def embed(self, table: Embedding) -> torch.Tensor:
        rows = table.source.rows
        ids, own = self._step.token_ids, self._weights.table(table)
        if self._group is None:
            return F.embedding(ids, own)
        local = ids - rows.start
        is_own = (local >= 0) & (local < len(rows))
        return F.embedding(torch.where(is_own, local, 0), own) * is_own[:, None]

    def rms_norm(self, x: torch.Tensor, weight: Vector) -> torch.Tensor:
        out = torch.empty_like(x)
        rms_norm(out, x, self._weights.vector(weight), self._eps)
        return out

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        return F.linear(x, *self._weights.linear(weight))

    def add_linear(self, residual: torch.Tensor, x: torch.Tensor, weight: Linear) -> None:
        if self._group is not None:
            residual.add_(self._group.all_reduce(self.linear(x, weight)))
            return
        matrix, bias = self._weights.linear(weight)
        if bias is not None:
            residual.add_(bias)
        residual.addmm_(x, matrix.t())

    def gated_linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        gate_up = self.linear(x, weight)
        out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
        gated(out, gate_up)
        return out

    def rope_kv(self, qkv: torch.Tensor, layer: int, q_norm: Vector | None, k_norm: Vector | None) -> None:
        step = self._step
        rope_kv(
            qkv,
            self._fixed.rope,
            *self._cache.layer(layer),
            step.positions,
            step.token_row,
            step.context_len,
            step.row_slot,
            self._fixed.block_table,
            q_weight=None if q_norm is None else self._weights.vector(q_norm),
            k_weight=None if k_norm is None else self._weights.vector(k_norm),
            eps=self._eps,
        )

    def attention(self, qkv: torch.Tensor, layer: int, window: int) -> torch.Tensor:
        step, fixed = self._step, self._fixed
        shape, head_dim = step.shape, fixed.spec.head_dim
        out = qkv.new_empty((qkv.shape[0], len(fixed.shard.part(fixed.spec.num_heads)) * head_dim))
        segments = (range(shape.decode_rows), 1), (range(shape.decode_rows, shape.rows), shape.longest)
        for rows, longest in segments:
            if rows:
                paged_attention(
                    qkv,
                    *self._cache.layer(layer),
                    step.query_start,
                    step.context_len,
                    step.row_slot,
                    fixed.block_table,
                    out,
                    fixed.workspace,
                    rows=rows,
                    max_query=longest,
                    scale=head_dim**-0.5,
                    window=window,
                )
        return out

    def select(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self._step.sample_rows)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._group is None else self._group.all_reduce(x)

    def head(self, x: torch.Tensor, weight: Linear, width: int, first: int) -> torch.Tensor:
        logits = self.linear(x, weight)
        if self._group is None:
            return logits
        shares = [len(Shard(rank, self._group.world).part(width)) for rank in range(self._group.world)]
        # Shares differ by one column at most; all ranks send as many as the largest.
        sent = F.pad(logits, (0, max(shares) - logits.shape[1]))
        gathered = self._group.all_gather(sent)
        return torch.cat([part[:, :share] for part, share in zip(gathered, shares, strict=True)], dim=1)
