"""The number of compute threads, from made-up /sys trees."""

import pytest

from asyncengine.cores import usable_cores


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def topology(siblings):
    base = "sys/devices/system/cpu"
    return {f"{base}/cpu{cpu}/topology/thread_siblings_list": f"{text}\n" for cpu, text in siblings.items()}


HYPERTHREADED = topology({0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"})


@pytest.mark.parametrize(
    ("files", "allowed", "cores"),
    [
        ({}, {0, 1, 2}, 3),
        (HYPERTHREADED, set(range(8)), 4),
        (HYPERTHREADED, {0, 4}, 1),
        (HYPERTHREADED, {0, 5}, 2),
        (HYPERTHREADED | {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, set(range(8)), 2),
        (HYPERTHREADED | {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, set(range(8)), 1),
        (HYPERTHREADED | {"sys/fs/cgroup/cpu.max": "max 100000\n"}, set(range(8)), 4),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            set(range(8)),
            3,
        ),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            set(range(8)),
            8,
        ),
    ],
)
def test_cores(tmp_path, files, allowed, cores):
    assert usable_cores(write(tmp_path, files), allowed) == cores


def test_this_machine():
    assert usable_cores() >= 1
