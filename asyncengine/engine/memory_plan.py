"""How many KV blocks an engine gets, from what its ranks measured."""

from collections.abc import Sequence

from ..config import CPU_KV_BYTES, EngineConfig
from ..errors import OutOfMemoryError
from ..wire.stages import Profiled

__all__ = ["plan_blocks"]


def plan_blocks(config: EngineConfig, profiles: Sequence[Profiled], *, fixed_length: bool) -> int:
    """The number of KV blocks, the same on every rank.

    The budget of all ranks together is `kv_cache_memory_bytes`, or else the smaller of
    `CPU_KV_BYTES` and what `gpu_memory_utilization` of the free memory leaves beside the activations. It
    never exceeds what `max_num_seqs` sequences of `max_model_len` can fill. Raises `OutOfMemoryError`,
    with the sums, unless a sequence of `max_model_len` fits (of one block, unless `fixed_length`).
    """
    per_block = sum(profile.bytes_per_block for profile in profiles)
    activations = sum(profile.activation_bytes for profile in profiles)
    available = min(profile.available_bytes for profile in profiles)
    usable = int(available * config.gpu_memory_utilization) - activations
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = min(usable, CPU_KV_BYTES)
    elif budget > usable:
        raise OutOfMemoryError(
            f"kv_cache_memory_bytes={budget:,} does not fit: {available:,} bytes are free, of which "
            f"gpu_memory_utilization={config.gpu_memory_utilization:g} may be used, and activations take "
            f"{activations:,}; that leaves {max(0, usable):,}"
        )
    longest = -(-config.max_model_len // config.block_size)
    blocks = min(budget // per_block if budget > 0 else 0, config.max_num_seqs * longest)
    needed = longest if fixed_length else 1
    if blocks < needed:
        tokens = needed * config.block_size
        raise OutOfMemoryError(
            f"the KV cache has no room for one sequence of {tokens:,} tokens: it needs "
            f"{needed * per_block:,} bytes ({per_block:,} per block of {config.block_size} tokens), and "
            f"{max(0, budget):,} are planned ({available:,} free, {activations:,} for activations); lower "
            "max_model_len, or raise kv_cache_memory_bytes"
        )
    return blocks
