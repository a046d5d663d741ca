"""Free memory, from made-up /proc and cgroup trees."""

import pytest

from asyncengine.worker.memory import available_bytes

MIB = 1 << 20


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def meminfo(mib):
    return {"proc/meminfo": f"MemTotal: {mib * 2048} kB\nMemFree: 5 kB\nMemAvailable: {mib * 1024} kB\n"}


def v2(path, limit, usage, cache):
    return {
        f"sys/fs/cgroup/{path}memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{path}memory.current": f"{usage}\n",
        f"sys/fs/cgroup/{path}memory.stat": f"anon 1\ninactive_file {cache}\nactive_file 7\n",
    }


def test_without_cgroups(tmp_path):
    assert available_bytes(write(tmp_path, meminfo(300))) == 300 * MIB


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ((1000 * MIB, 500 * MIB, 0), ("max", 100 * MIB, 0), 300 * MIB),
        ((1000 * MIB, 900 * MIB, 50 * MIB), ("max", 100 * MIB, 0), 150 * MIB),
        ((1000 * MIB, 500 * MIB, 0), (200 * MIB, 150 * MIB, 10 * MIB), 60 * MIB),
        ((1000 * MIB, 500 * MIB, 0), (100 * MIB, 150 * MIB, 0), 0),
    ],
)
def test_tightest_group_wins(tmp_path, outer, inner, expected):
    files = meminfo(300) | {"proc/self/cgroup": "0::/app/job\n"}
    write(tmp_path, files | v2("app/", *outer) | v2("app/job/", *inner))
    assert available_bytes(tmp_path) == expected


def test_path_of_another_namespace_falls_back_to_the_mounted_root(tmp_path):
    write(tmp_path, meminfo(300) | {"proc/self/cgroup": "0::/not/here\n"} | v2("", 90 * MIB, 50 * MIB, 0))
    assert available_bytes(tmp_path) == 40 * MIB


def test_version_1(tmp_path):
    base = "sys/fs/cgroup/memory/job/memory."
    files = {
        "proc/self/cgroup": "5:cpu,memory:/job\n1:name=systemd:/other\n0::/\n",
        base + "limit_in_bytes": f"{100 * MIB}\n",
        base + "usage_in_bytes": f"{90 * MIB}\n",
        base + "stat": f"inactive_file 1\ntotal_inactive_file {20 * MIB}\n",
    }
    assert available_bytes(write(tmp_path, meminfo(300) | files)) == 30 * MIB
