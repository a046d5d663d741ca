"""Round trips and bandwidth of the shared-memory ring.

    python benchmarks/ring.py [--seconds 0.7] [--round-trips 3000]

A round trip is a record to another process and one back. Both sides wait a moment before they send, so
that the other is back in its sleep (or spin) as in service; that moment is not counted. `spin`: both sides
spin; `futex`: both sleep; `asyncio`, `uvloop`: the other side sleeps on its futex, this side on the eventfd
in its event loop, as a worker and an engine do. Bandwidth counts the bytes written once, however many
readers take them. Processes beyond the number of cores share them, which shows in the numbers.
"""

import argparse
import asyncio
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvloop

from asyncengine._fast import ring

CAPACITY = 4 << 20
SIZES = (64, 1 << 10, 16 << 10, 128 << 10, 1 << 20)
DATA, END = 1, 0
PAUSE = 0.0002
"""Seconds each side waits before it sends."""

ECHO = """
import array, sys, time
from asyncengine._fast import ring
there, back, bell, spin = map(int, sys.argv[1:5])
pause = float(sys.argv[5])
reader, writer = ring.RingReader(there, 0), ring.RingWriter(back)
writer.attach_eventfd(0, bell)
while reader.read(None, spin)[0]:
    came = time.perf_counter()
    time.sleep(pause)
    writer.write(1, array.array("d", [came, time.perf_counter()]))
"""
DRAIN = """
import sys
from asyncengine._fast import ring
reader = ring.RingReader(int(sys.argv[1]), int(sys.argv[2]))
while reader.read(None, 20)[0]:
    pass
"""


@contextmanager
def child(program: str, *numbers: float, fds: tuple[int, ...]) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-P", "-c", program, *map(str, numbers)], pass_fds=fds)
    try:
        yield
        process.wait(10)
    finally:
        process.kill()
        process.wait()


@contextmanager
def echo(spin_us: int) -> Iterator[tuple[ring.RingWriter, ring.RingReader, int]]:
    """Rings to and from an echoing process, and the eventfd of the way back."""
    there, back = ring.create(CAPACITY, 1), ring.create(CAPACITY, 1)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    fds = (there, back, bell)
    writer, reader = ring.RingWriter(there), ring.RingReader(back, 0)
    with child(ECHO, *fds, spin_us, PAUSE, fds=fds):
        for _ in range(100):  # warm, and sure that the other side runs
            writer.try_write(DATA, b"")
            reader.read(10)
        yield writer, reader, bell
        writer.try_write(END, b"")
    for fd in fds:
        os.close(fd)


def trip(begin: float, record: tuple[int, bytes] | None) -> float:
    """Seconds there and back, without the other side's pause; clocks are the same in all processes."""
    end = time.perf_counter()
    assert record is not None, "no echo in ten seconds"
    came, left = struct.unpack("2d", record[1])
    return (came - begin) + (end - left)


def blocking_round_trips(count: int, spin_us: int) -> list[float]:
    times = []
    with echo(spin_us) as (writer, reader, _):
        for _ in range(count):
            time.sleep(PAUSE)
            begin = time.perf_counter()
            writer.try_write(DATA, bytes(64))
            times.append(trip(begin, reader.read(10, spin_us)))
    return times


def loop_round_trips(count: int, make_loop: Callable[[], asyncio.AbstractEventLoop] | None) -> list[float]:
    times: list[float] = []

    async def main(writer: ring.RingWriter, reader: ring.RingReader, bell: int) -> None:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        begin = 0.0

        def wake() -> None:
            os.eventfd_read(bell)
            times.append(trip(begin, reader.try_read()))
            woken.set()

        loop.add_reader(bell, wake)
        for _ in range(count):
            time.sleep(PAUSE)
            woken.clear()
            reader.arm()
            begin = time.perf_counter()
            writer.try_write(DATA, bytes(64))
            await woken.wait()
        loop.remove_reader(bell)

    with echo(0) as ends, asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(main(*ends))
    return times


def bandwidth(size: int, num_readers: int, seconds: float) -> tuple[float, float]:
    """Records and bytes per second."""
    fd = ring.create(CAPACITY, num_readers)
    writer = ring.RingWriter(fd)
    data = os.urandom(size)
    children = [child(DRAIN, fd, index, fds=(fd,)) for index in range(num_readers)]
    for each in children:
        each.__enter__()
    while writer.try_write(DATA, data):
        pass
    for _ in range(100):  # until all readers run
        writer.write(DATA, data)
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        for _ in range(8):
            writer.write(DATA, data)
        count += 8
    writer.write(END, b"")
    for each in children:
        each.__exit__(None, None, None)
    os.close(fd)
    return count / elapsed, count * size / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.7, help="per line of the bandwidth table")
    parser.add_argument("--round-trips", type=int, default=3000)
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, ring of {CAPACITY >> 20} MiB\n")

    print(f"{'round trip, 64 bytes':24}{'p50 µs':>10}{'p99 µs':>10}")
    count = options.round_trips
    for name, times in (
        ("spin", blocking_round_trips(count, 1000)),
        ("futex", blocking_round_trips(count, 0)),
        ("eventfd to asyncio", loop_round_trips(count, None)),
        ("eventfd to uvloop", loop_round_trips(count, uvloop.new_event_loop)),
    ):
        cuts = statistics.quantiles(times, n=100)
        print(f"{name:24}{cuts[49] * 1e6:10.1f}{cuts[98] * 1e6:10.1f}")

    print(f"\n{'record':>10}{'readers':>10}{'records/s':>14}{'MB/s':>10}")
    for size in SIZES:
        for num_readers in (1, 4):
            records, rate = bandwidth(size, num_readers, options.seconds)
            print(f"{size:10,}{num_readers:10}{records:14,.0f}{rate / 1e6:10,.0f}")


if __name__ == "__main__":
    main()
