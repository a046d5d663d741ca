"""Chooses how each kernel is launched on this GPU, and rewrites its entries in kernels/configs.py.

    python benchmarks/tune.py [--kernel NAME ...] [--seconds 1800] [--print]
    python benchmarks/tune.py --list
    python benchmarks/tune.py --compile 90 [--kernel NAME ...] [--seconds 600]

Every kernel has a grid of configurations (gpu_parts/grids.py) and launches at representative sizes
(gpu_parts/workloads.py). Beginning with the shipped configuration, one axis of the grid is changed at a
time for as long as that helps. Left out is what does not compile, spills, takes too much shared memory, or
gives another output than the shipped configuration. What counts is the geometric mean of the times, with a
cold L2 cache, as shares of the shipped configuration's. An entry is written when its kernel is done.

--print changes no file. --list shows the grids. --compile needs no GPU: it compiles the grid for a
capability, as 90 for 9.0, what is closest to the shipped configuration first, and tells registers, stack
and shared memory. Run it from a checkout; compute capability 8.0 or newer.
"""

import argparse
import datetime
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # where it is not there already: under -P

from gpu_parts.builds import builds, flaw, using  # noqa: E402
from gpu_parts.grids import GRIDS, Numbers, candidates, max_shared, search  # noqa: E402
from gpu_parts.machine import median_ms  # noqa: E402
from gpu_parts.workloads import Workload  # noqa: E402

from asyncengine.kernels.configs import CONFIGS, config, config_of  # noqa: E402

TABLE = HERE.parent / "kernels" / "configs.py"
RTOL = 1.6e-2
"""Relative error of a bfloat16 that is rounded after sums of another order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the grids and end")
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="compile only; needs no GPU")
    parser.add_argument("--kernel", action="append", choices=GRIDS, help="only these")
    parser.add_argument("--seconds", type=float, default=1800.0, help="most that all kernels may take")
    parser.add_argument("--print", action="store_true", help="print entries, leave kernels/configs.py alone")
    args = parser.parse_args()
    kernels = [name for name in GRIDS if not args.kernel or name in args.kernel]
    if args.list:
        list_grids(kernels)
    elif args.compile:
        if args.compile < 80:
            sys.exit(f"the kernels are for compute capability 8.0 or newer, not {args.compile / 10}")
        shares(kernels, args.seconds, lambda name, end: compile_grid(name, args.compile, end))
    else:
        from asyncengine.gpus import unusable, visible_gpus

        reason = unusable(visible_gpus())
        if reason is not None:
            sys.exit(f"tuning needs an NVIDIA GPU: {reason}; --list and --compile work without one")
        shares(kernels, args.seconds, lambda name, end: tune(name, end, write=not args.print))


def shares(kernels: list[str], seconds: float, work: Callable[[str, float], None]) -> None:
    """Calls work(name, its deadline): each kernel may take an equal share of the time that is left."""
    end = time.monotonic() + seconds
    for i, name in enumerate(kernels):
        now = time.monotonic()
        work(name, now + (end - now) / (len(kernels) - i))


def list_grids(kernels: list[str]) -> None:
    for name in kernels:
        grid = GRIDS[name]
        print(f"{name}: {len(candidates(grid, numbers_of(name, 80)))} configurations")
        for axis, values in grid.axes.items():
            print(f"    {axis:12}" + ", ".join(map(str, values)))
        print(f"    {'times of':12}" + "; ".join(work.name for work in grid.workloads(torch.device("meta"))))


def compile_grid(name: str, capability: int, deadline: float) -> None:
    """One line per configuration and kind of launch."""
    grid = GRIDS[name]
    workloads = list(grid.workloads(torch.device("meta")))
    todo = candidates(grid, numbers_of(name, capability))
    print(f"{name}, at most {max_shared(capability)} bytes of shared memory, {len(todo)} configurations")
    for i, numbers in enumerate(todo):
        if i and time.monotonic() >= deadline:
            print(f"    time is up: {len(todo) - i} are left out", flush=True)
            return
        found = builds(name, numbers, capability, workloads)
        verdict = flaw(found, capability)
        print(f"    {'shipped: ' * (i == 0)}{text_of(numbers)}" + f": {verdict}" * bool(verdict), flush=True)
        for build in found if not isinstance(found, str) else ():
            print(
                f"        {build.registers} registers, {build.stack} stack, {build.shared} shared", flush=True
            )


def tune(name: str, deadline: float, write: bool) -> None:
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    grid = GRIDS[name]
    workloads = list(grid.workloads(device))
    before = [[tensor.clone() for tensor in work.written] for work in workloads]
    shipped = numbers_of(name, capability)
    if reason := flaw(builds(name, shipped, capability, workloads), capability):
        print(f"{name}: what is shipped cannot be used, {reason}; 8.0's configuration takes its place")
        shipped = numbers_of(name, 80)
    expected = outputs(name, shipped, capability, workloads, before)
    old = times(name, shipped, capability, workloads)
    measured = {text_of(shipped): old}
    print(f"{name}, shipped: {text_of(shipped)}", flush=True)

    def cost(numbers: Numbers) -> float:
        if numbers == shipped:
            return 1.0
        reason = flaw(builds(name, numbers, capability, workloads), capability)
        if not reason:
            try:
                reason = difference(
                    expected, outputs(name, numbers, capability, workloads, before), workloads
                )
            except triton.runtime.errors.OutOfResources as e:
                reason = str(e)
        if reason:
            print(f"    {text_of(numbers)}: {reason}", flush=True)
            return math.inf
        new = measured[text_of(numbers)] = times(name, numbers, capability, workloads)
        print(f"    {text_of(numbers)}: {mean_ratio(new, old):.3f}", flush=True)
        return mean_ratio(new, old)

    best, finished = search(grid, shipped, cost, deadline)
    new = measured[text_of(best)]
    print(f"{name}: {text_of(best)}, {mean_ratio(new, old):.3f} of the time" + ", cut short" * (not finished))
    for work, was, now in zip(workloads, old, new, strict=True):
        print(f"    {work.name:32}{1e3 * was:10.1f} us ->{1e3 * now:10.1f} us  {now / was:.3f}")
    origin = f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {datetime.date.today()}"
    if write:
        TABLE.write_text(with_entry(TABLE.read_text(), name, capability, best, origin))
    else:
        print("\n".join(entry(capability, best, origin)))
    CONFIGS[name][capability] = config(**best)  # which the kernels that are still to come are tuned with


def outputs(
    name: str, numbers: Numbers, capability: int, workloads: list[Workload], before: list[list[torch.Tensor]]
) -> list[list[torch.Tensor]]:
    """What one launch of each workload leaves, from the same state each time."""
    found = []
    with using(name, numbers, capability):
        for work, state in zip(workloads, before, strict=True):
            for tensor, old in zip(work.written, state, strict=True):
                tensor.copy_(old)
            work.bind()()
            found.append([tensor.clone() for tensor in work.written])
    return found


def difference(
    expected: list[list[torch.Tensor]], found: list[list[torch.Tensor]], workloads: list[Workload]
) -> str:
    """How the outputs differ by more than rounding; empty where they do not."""
    for work, mine, its in zip(workloads, expected, found, strict=True):
        for a, b in zip(mine, its, strict=True):
            if a.is_floating_point():
                a, b = a.float(), b.float()
                error = (a - b).abs() - RTOL * (a.abs() + a.square().mean().sqrt())
                if not bool((error <= 0).all()):  # nor for NaN
                    return f"another output at {work.name}, by {float((a - b).abs().max()):.3g}"
            elif float((a != b).float().mean()) > work.slack:
                return f"another output at {work.name}: {int((a != b).sum())} of {a.numel()} integers"
    return ""


def times(name: str, numbers: Numbers, capability: int, workloads: list[Workload]) -> list[float]:
    """Milliseconds of each workload."""
    with using(name, numbers, capability):
        return [median_ms(work.bind(), rep=50) for work in workloads]


def mean_ratio(new: list[float], old: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(math.log(a / b) for a, b in zip(new, old, strict=True)) / len(old))


def numbers_of(name: str, capability: int) -> Numbers:
    block, options = config_of(name, capability)
    return block | options


def text_of(numbers: Numbers) -> str:
    return ", ".join(f"{name}={value}" for name, value in numbers.items())


def entry(capability: int, numbers: Numbers, origin: str) -> list[str]:
    return [f"        # {origin}", f"        {capability}: config({text_of(numbers)}),"]


def with_entry(text: str, kernel: str, capability: int, numbers: Numbers, origin: str) -> str:
    """The text of kernels/configs.py with one entry new or replaced, together with the comments above it."""
    section = re.search(rf'^    "{kernel}": {{\n(.*?)^    }},\n', text, re.DOTALL | re.MULTILINE)
    if section is None:
        raise ValueError(f"kernels/configs.py has no table of {kernel!r}")
    entries: dict[int, list[str]] = {}
    lines: list[str] = []
    for line in section[1].splitlines():
        lines.append(line)
        if found := re.match(r" {8}(\d+): config\(", line):
            entries[int(found[1])], lines = lines, []
    entries[capability] = entry(capability, numbers, origin)
    body = "".join(line + "\n" for known in sorted(entries) for line in entries[known])
    return text[: section.start(1)] + body + text[section.end(1) :]


if __name__ == "__main__":
    main()
