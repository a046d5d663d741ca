"""How much memory this process may still take, read from /proc and the cgroup files."""

from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes: the machine's available memory, or what the tightest enclosing cgroup leaves if less.

    Page cache that the kernel can drop counts as free, as it does in `MemAvailable`.
    """
    return max(0, min([_machine(root), *_cgroup_v2(root), *_cgroup_v1(root)]))


def _machine(root: Path) -> int:
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup_v2(root: Path) -> list[int]:
    base = root / "sys/fs/cgroup"
    return [
        room
        for group in _ancestors(base, _membership(root, ""))
        if (room := _room(group, "memory.max", "memory.current", "inactive_file")) is not None
    ]


def _cgroup_v1(root: Path) -> list[int]:
    base = root / "sys/fs/cgroup/memory"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return [
        room
        for group in _ancestors(base, _membership(root, "memory"))
        if (room := _room(group, *names)) is not None
    ]


def _membership(root: Path, controller: str) -> str | None:
    """The path of this process's group in the hierarchy of `controller` ("" is v2's only one)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return None


def _ancestors(base: Path, path: str | None) -> list[Path]:
    """The group's directory and those above it. In a container the path may not exist: then the root."""
    if path is None:
        return []
    group = base / path.strip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(base))]


def _room(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = int((group / limit_name).read_text())
        usage = int((group / usage_name).read_text())
        statistics = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return None
    cache = next((int(line.split()[1]) for line in statistics if line.split()[0] == cache_name), 0)
    return limit - usage + cache
