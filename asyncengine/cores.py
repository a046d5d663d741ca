"""How many cores this process may compute on."""

import os
from pathlib import Path

__all__ = ["usable_cores"]


def usable_cores(root: Path = Path("/"), allowed: set[int] | None = None) -> int:
    """Physical cores of the affinity mask, bounded by the cgroup's CPU quota.

    Two hardware threads of one core share its arithmetic units: a kernel that fills them gains nothing
    from the second. `allowed`: logical CPUs; None takes the process's own mask.
    """
    cpus = os.sched_getaffinity(0) if allowed is None else allowed
    cores = len({_siblings(root, cpu) for cpu in cpus})
    quota = _cgroup_quota(root)
    return max(1, min(cores, quota)) if quota else cores


def _siblings(root: Path, cpu: int) -> str:
    """Names the core that a logical CPU belongs to; the CPU itself where the kernel does not say."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return f"cpu{cpu}"


def _cgroup_quota(root: Path) -> int | None:
    """Whole cores of this cgroup's CPU bandwidth limit (v2, then v1), or None where there is none."""
    base = root / "sys/fs/cgroup"
    try:
        limit, period = (base / "cpu.max").read_text().split()
        return None if limit == "max" else max(1, int(limit) // int(period))
    except (OSError, ValueError):
        pass
    try:
        allotted = int((base / "cpu/cpu.cfs_quota_us").read_text())
        length = int((base / "cpu/cpu.cfs_period_us").read_text())
        return max(1, allotted // length) if allotted > 0 else None
    except (OSError, ValueError):
        return None
