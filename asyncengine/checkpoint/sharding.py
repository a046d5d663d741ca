"""How a model is divided over the ranks of tensor parallelism: integers only, known to both towers."""

from typing import NamedTuple

from ..errors import ConfigError
from .spec import ModelSpec

__all__ = ["Shard", "check_parallel", "comm_region_bytes", "possible_sizes"]

_MAX_RANKS = 64
_REGION = 1 << 20


class Shard(NamedTuple):
    """The part of a model that one rank holds. Ranges are of the whole tensor's rows or columns."""

    rank: int = 0
    world: int = 1

    def part(self, count: int) -> range:
        """This rank's share of `count` things in order; shares differ by at most one."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def kv_heads(self, count: int) -> range:
        """This rank's KV heads: a share of them, or the one it has in common with other ranks."""
        if count >= self.world:
            return self.part(count)
        head = count * self.rank // self.world
        return range(head, head + 1)


def check_parallel(spec: ModelSpec, ranks: int) -> None:
    """Raises ConfigError, with the sizes that are possible, unless `spec` divides over `ranks`.

    Query heads and the MLP's width divide evenly; KV heads divide evenly or are replicated evenly.
    The vocabulary may be of any size.
    """
    rule = _violation(spec, ranks)
    if rule is None:
        return
    sizes = ", ".join(map(str, possible_sizes(spec)))
    raise ConfigError(
        f"tensor_parallel_size={ranks} does not divide this model: {rule}; possible sizes: {sizes}",
        parameter="tensor_parallel_size",
        value=ranks,
    )


def possible_sizes(spec: ModelSpec) -> list[int]:
    """All values of `tensor_parallel_size` that `check_parallel` lets pass."""
    return [ranks for ranks in range(1, _MAX_RANKS + 1) if _violation(spec, ranks) is None]


def _violation(spec: ModelSpec, ranks: int) -> str | None:
    if not 1 <= ranks <= _MAX_RANKS:
        return f"it must lie in [1, {_MAX_RANKS}]"
    if spec.num_heads % ranks:
        return f"it has {spec.num_heads} attention heads"
    if spec.num_kv_heads % ranks and ranks % spec.num_kv_heads:
        return f"it has {spec.num_kv_heads} KV heads, neither a multiple nor a divisor"
    if spec.intermediate_size % ranks:
        return f"its MLP is {spec.intermediate_size} wide"
    if spec.vocab_size < ranks:
        return f"its vocabulary has {spec.vocab_size} tokens"
    return None


def comm_region_bytes(spec: ModelSpec) -> int:
    """Bytes of one rank's region in the shared mapping of the collectives.

    Larger transfers go in pieces; a region holds one row of everything that is exchanged.
    """
    widest = 4 * max(spec.hidden_size, spec.vocab_size)
    return -(-max(_REGION, widest) // 4096) * 4096
