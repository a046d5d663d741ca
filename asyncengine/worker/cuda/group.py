"""The collectives of tensor parallelism: NCCL between GPUs, gloo between hosts in their place."""

import torch
import torch.distributed as dist

from ...checkpoint.sharding import Shard

__all__ = ["Group"]


class Group:
    """All ranks. They meet at an empty anonymous file that each of them has inherited as `fd`."""

    def __init__(self, shard: Shard, place: torch.device, fd: int) -> None:
        self.rank, self.world = shard
        self._flag = torch.zeros(1, dtype=torch.int32, device=place)
        # Opened anew through the descriptor: what is locked must not be shared.
        store = dist.FileStore(f"/proc/self/fd/{fd}", self.world)  # type: ignore[attr-defined]
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world,
            device_id=place if place.type == "cuda" else None,
        )

    def agree(self, fine: bool) -> bool:
        """Whether all ranks say so; waits for them."""
        self._flag.fill_(fine)
        dist.all_reduce(self._flag, op=dist.ReduceOp.MIN)
        return bool(self._flag.item())

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[world, *x.shape]: every rank's `x`, all of one shape."""
        rows, *shape = x.shape
        gathered = x.new_empty((self.world * rows, *shape))
        dist.all_gather_into_tensor(gathered, x)
        return gathered.view(self.world, rows, *shape)

    def close(self) -> None:
        """Ends the group; all ranks must do so."""
        dist.destroy_process_group()
