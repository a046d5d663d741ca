"""How many KV blocks an engine gets, from what its ranks measured."""

from collections.abc import Sequence
from typing import NamedTuple

from ..config import CPU_KV_BYTES, EngineConfig
from ..errors import OutOfMemoryError
from ..wire.stages import DeviceMemory, Profiled

__all__ = ["plan_blocks"]

CUDA_RESERVE = 256 << 20
"""Free bytes of a GPU that are never planned with: libraries load some of their code at its first use, and
the allocator takes memory in whole pages."""


def plan_blocks(config: EngineConfig, profiles: Sequence[Profiled], *, fixed_length: bool) -> int:
    """The number of KV blocks, the same on every rank.

    CPU: the budget of all ranks together is `kv_cache_memory_bytes`, or else the smaller of
    `CPU_KV_BYTES` and what `gpu_memory_utilization` of the free memory leaves beside the activations. It
    never exceeds what `max_num_seqs` sequences of `max_model_len` can fill.

    CUDA: the budget of each rank is `kv_cache_memory_bytes`, or else what the engine may take of its GPU
    less weights, activations and graphs; the rank with the least decides. The engine may take
    `gpu_memory_utilization` of the GPU's total, and never more than was free when it started.

    Raises `OutOfMemoryError`, with the sums and what to change, unless a sequence of `max_model_len` fits
    (of one block, unless `fixed_length`).
    """
    longest = -(-config.max_model_len // config.block_size)
    needed = longest if fixed_length else 1
    devices = [(profile, profile.device) for profile in profiles if profile.device is not None]
    if not devices:
        return _plan_host(config, profiles, longest, needed)
    return min(
        _plan_device(config, _Budget.of(config, rank, profile, device), needed)
        for rank, (profile, device) in enumerate(devices)
    )


def _plan_host(config: EngineConfig, profiles: Sequence[Profiled], longest: int, needed: int) -> int:
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
    blocks = min(budget // per_block if budget > 0 else 0, config.max_num_seqs * longest)
    if blocks < needed:
        tokens = needed * config.block_size
        raise OutOfMemoryError(
            f"the KV cache has no room for one sequence of {tokens:,} tokens: it needs "
            f"{needed * per_block:,} bytes ({per_block:,} per block of {config.block_size} tokens), and "
            f"{max(0, budget):,} are planned ({available:,} free, {activations:,} for activations); lower "
            "max_model_len, or raise kv_cache_memory_bytes"
        )
    return blocks


class _Budget(NamedTuple):
    """The sums of one GPU, in bytes."""

    rank: int
    total: int
    start: int
    """Free when the rank had started."""
    limit: int
    """What the engine may take."""
    taken: int
    """What it has taken by now: the weights, and what libraries hold."""
    weights: int
    activations: int
    graphs: int
    per_block: int

    @classmethod
    def of(cls, config: EngineConfig, rank: int, profile: Profiled, device: DeviceMemory) -> "_Budget":
        share = int(device.total_bytes * config.gpu_memory_utilization)
        if config.kv_cache_memory_bytes is not None:
            share = device.total_bytes  # the caller has said how much; what is free still bounds it
        return cls(
            rank=rank,
            total=device.total_bytes,
            start=device.start_bytes,
            limit=max(0, min(share, device.start_bytes - CUDA_RESERVE)),
            # What others have taken meanwhile counts too; what they have given back may be taken again.
            taken=max(device.weight_bytes, device.start_bytes - profile.available_bytes),
            weights=device.weight_bytes,
            activations=profile.activation_bytes,
            graphs=device.graph_bytes,
            per_block=profile.bytes_per_block,
        )

    @property
    def room(self) -> int:
        """For keys and values; negative where not even the rest fits."""
        return self.limit - self.taken - self.activations - self.graphs

    @property
    def sums(self) -> str:
        gib = 2**30
        used = (self.total - self.start) / gib
        rows = (
            f"{self.limit / gib:.2f} GiB may be taken",
            f"weights {self.weights / gib:.2f}",
            f"libraries {(self.taken - self.weights) / gib:.2f}",
            f"activations {self.activations / gib:.2f}",
            f"graphs {self.graphs / gib:.2f}",
        )
        return (
            f"rank {self.rank}: GPU of {self.total / gib:.2f} GiB, {used:.2f} in use before the start; "
            f"{' - '.join(rows)} = {self.room / gib:.2f} GiB for keys and values"
        )


def _plan_device(config: EngineConfig, budget: _Budget, needed: int) -> int:
    wanted, room = config.kv_cache_memory_bytes, budget.room
    if wanted is not None and 0 <= room < wanted:
        raise OutOfMemoryError(
            f"kv_cache_memory_bytes={wanted:,} does not fit ({budget.sums}); lower it to {room:,} or less"
        )
    kv_bytes = room if wanted is None else min(wanted, room)
    blocks = max(0, kv_bytes // budget.per_block)
    if blocks < needed:
        need = needed * budget.per_block
        tokens = needed * config.block_size
        raise OutOfMemoryError(
            f"the KV cache has no room for one sequence of {tokens:,} tokens, which takes {need:,} bytes "
            f"({budget.sums}); {_remedy(config, budget, need, needed)}"
        )
    return blocks


def _remedy(config: EngineConfig, budget: _Budget, need: int, needed: int) -> str:
    """Which settings to change, those that suffice by themselves first."""
    lacking = need - budget.room
    remedies: list[tuple[bool, str]] = []
    if config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes < need:
        remedies.append((lacking <= 0, f"raise kv_cache_memory_bytes to {need:,}"))
    if config.kv_cache_memory_bytes is None and budget.limit < budget.start - CUDA_RESERVE:
        share = (budget.limit + lacking) / budget.total
        enough = budget.limit + lacking <= budget.start - CUDA_RESERVE
        goal = f" to {share + 0.005:.2f}" if enough else ""
        remedies.append((enough, f"raise gpu_memory_utilization{goal}"))
    if needed > 1:
        fits = budget.room // budget.per_block
        goal = f" to {fits * config.block_size:,}" if fits > 0 else ""
        remedies.append((fits > 0, f"lower max_model_len{goal}"))
    if budget.graphs:
        remedies.append((budget.graphs >= lacking, "set enforce_eager=True"))
    remedies.append((budget.activations >= 2 * lacking, "lower max_num_batched_tokens"))
    remedies.append((False, "use tensor_parallel_size or cpu_offload_gb"))
    if budget.total - budget.start > budget.total // 10:
        remedies.append((False, "end other programs on this GPU"))
    # Sorting is stable: what was listed first of its kind stays first.
    return ", or ".join(text for _, text in sorted(remedies, key=lambda remedy: not remedy[0]))
