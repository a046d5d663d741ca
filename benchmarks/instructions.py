"""Instructions that the host spends on a step and on a token, counted by callgrind.

    python benchmarks/instructions.py [--running 1 64 256] [--steps 100] [--speculate {new,repeated}]

Runs step_overhead.py under valgrind: the real scheduler, ring and event loop, and a worker process (not
counted) that computes nothing. Two runs of different lengths are subtracted, so that imports and start-up
fall away. Unlike times, the counts hardly depend on what else the machine does, except for a few sequences,
where they vary by a fifth with how often the loop waits for the worker. Compare them before and
after a change. `--keep FOLDER` leaves the files for callgrind_annotate.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LONGER = 3


def count(arguments: list[str], out: Path) -> tuple[int, float]:
    """Instructions of the whole host process, and the tokens that a step gave."""
    script = str(Path(__file__).with_name("step_overhead.py"))
    done = subprocess.run(
        [
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"),
            *(sys.executable, script, *arguments),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"step_overhead.py failed under valgrind:\n{done.stderr[-3000:]}")
    with out.open() as file:
        for line in file:
            if line.startswith(("summary:", "totals:")):
                return int(line.split()[1]), float(done.stdout.split()[-1])
    sys.exit(f"{out} has no total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=100, help="of the shorter run")
    parser.add_argument("--speculate", choices=["new", "repeated"], help="see step_overhead.py")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed")
    print(f"{'running':>8}{'per step':>14}{'per token':>14}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for running in args.running:
            counts = []
            for steps in (args.steps, LONGER * args.steps):
                arguments = ["--running", str(running), "--steps", str(steps)]
                if args.speculate:
                    arguments += ["--speculate", args.speculate]
                counts.append(count(arguments, folder / f"callgrind.{running}.{steps}"))
            (short, _), (long, tokens) = counts
            step = (long - short) / ((LONGER - 1) * args.steps)
            print(f"{running:>8}{step:>14,.0f}{step / tokens:>14,.1f}", flush=True)


if __name__ == "__main__":
    main()
