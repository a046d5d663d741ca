"""The ring against a list-of-records model, and between processes that check every byte."""

import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine._fast import ring

PAGE = os.sysconf("SC_PAGESIZE")


@contextmanager
def made(capacity: int, num_readers: int) -> Iterator[tuple[int, ring.RingWriter, list[ring.RingReader]]]:
    fd = ring.create(capacity, num_readers)
    writer = ring.RingWriter(fd)
    readers = [ring.RingReader(fd, index) for index in range(num_readers)]
    try:
        yield fd, writer, readers
    finally:
        for end in (writer, *readers):
            end.close()
        os.close(fd)


# ---- one process


@settings(max_examples=200, deadline=None)
@given(
    num_readers=st.sampled_from([1, 2, 4, 64]),
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(0, 63), st.integers(0, PAGE - 8) | st.integers(0, 40)),
        max_size=80,
    ),
)
def test_equals_a_model(num_readers: int, steps: list[tuple[bool, int, int]]) -> None:
    # Each reader holds the records it has not taken; a record takes 8 bytes and its data rounded up to 8.
    model: list[deque[tuple[int, bytes]]] = [deque() for _ in range(num_readers)]
    with made(1, num_readers) as (_, writer, readers):
        for number, (writes, index, size) in enumerate(steps):
            if writes:
                data = random.Random(number).randbytes(size)
                used = max(sum(8 + (len(d) + 7) // 8 * 8 for _, d in queue) for queue in model)
                fits = used + 8 + (size + 7) // 8 * 8 <= PAGE
                cut = index * size // 63
                assert writer.try_write2(number, data[:cut], memoryview(data)[cut:]) == fits
                if fits:
                    for queue in model:
                        queue.append((number, data))
            else:
                queue = model[index % num_readers]
                assert readers[index % num_readers].try_read() == (queue.popleft() if queue else None)
        for reader, queue in zip(readers, model, strict=True):
            assert [reader.try_read() for _ in range(len(queue) + 1)] == [*queue, None]


def test_the_largest_record_fits_wherever_the_ring_stands() -> None:
    with made(PAGE, 1) as (_, writer, [reader]):
        assert writer.max_record == PAGE - 8
        for shift in range(0, PAGE, 104):
            data = os.urandom(writer.max_record)
            assert writer.try_write(7, data) and not writer.try_write(7, b"")
            assert reader.try_read() == (7, data)
            assert writer.try_write(8, b"x" * (shift % 1000)) and reader.try_read() is not None
        with pytest.raises(ValueError, match=f"max_record is {PAGE - 8}"):
            writer.try_write(1, bytes(PAGE - 7))
        with pytest.raises(ValueError, match="max_record"):
            writer.write(1, bytes(PAGE - 7), 1.0)


def test_any_buffer_is_taken() -> None:
    import array

    numbers = array.array("i", [1, 2, 3])
    with made(PAGE, 1) as (_, writer, [reader]):
        for data in (numbers, memoryview(numbers), bytearray(numbers), numbers.tobytes()):
            assert writer.try_write2(2**32 - 1, data, b"")
            assert reader.try_read() == (2**32 - 1, numbers.tobytes())
        with pytest.raises(TypeError):
            writer.try_write2(1, b"", "text")  # type: ignore[arg-type]
        with pytest.raises(BufferError):
            writer.try_write(1, memoryview(bytes(10))[::2])
        with pytest.raises(OverflowError):
            writer.try_write(2**32, b"")
        assert reader.try_read() is None


def test_the_segment_is_private() -> None:
    shm = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    with made(100_000, 3) as (fd, writer, _):
        assert writer.max_record == 131072 - 8 and writer.num_readers == 3
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert not os.get_inheritable(fd)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        assert not os.path.isdir("/dev/shm") or set(os.listdir("/dev/shm")) <= shm


def test_what_is_no_ring_is_refused() -> None:
    for capacity, readers in ((0, 1), (2**31 + 1, 1), (PAGE, 0), (PAGE, 65), (-1, 1), (2**70, 1)):
        with pytest.raises(ValueError):
            ring.create(capacity, readers)
    plain = os.memfd_create("plain")
    for content in (b"", bytes(3 * PAGE), os.urandom(3 * PAGE)):
        os.ftruncate(plain, 0)
        os.pwrite(plain, content, 0)
        with pytest.raises(ValueError, match="not a ring"):
            ring.RingReader(plain, 0)
        with pytest.raises(ValueError, match="not a ring"):
            ring.RingWriter(plain)
    os.close(plain)
    with pytest.raises(OSError):
        ring.RingWriter(plain)
    with made(PAGE, 2) as (fd, writer, _):
        with pytest.raises(ValueError, match="no reader 2"):
            ring.RingReader(fd, 2)
        with pytest.raises(ValueError, match="no reader 2"):
            writer.attach_eventfd(2, 0)


def test_a_closed_end_refuses() -> None:
    with made(PAGE, 1) as (_, writer, [reader]):
        writer.close()
        reader.close()
        for use in (lambda: writer.try_write(1, b""), reader.try_read, reader.arm, lambda: reader.read(0.0)):
            with pytest.raises(ValueError, match="closed"):
                use()


def test_timeouts_and_wakes_between_threads() -> None:
    with made(PAGE, 1) as (_, writer, [reader]):
        for spin in (0.0, 100.0):
            begin = time.monotonic()
            assert reader.read(0.05, spin) is None
            assert 0.045 < time.monotonic() - begin < 2.0
        late = threading.Timer(0.05, lambda: writer.try_write(1, b"late"))
        late.start()
        assert reader.read() == (1, b"late")
        assert writer.try_write(1, bytes(writer.max_record))
        assert not writer.write(2, b"", 0.02)
        threading.Timer(0.05, reader.try_read).start()
        assert writer.write(2, b"now") and reader.try_read() == (2, b"now")


def test_an_end_in_use_cannot_be_closed() -> None:
    with made(PAGE, 1) as (_, writer, [reader]):
        waiting = threading.Thread(target=reader.read)
        waiting.start()
        time.sleep(0.05)
        with pytest.raises(RuntimeError, match="another thread"):
            reader.close()
        with pytest.raises(RuntimeError, match="another thread"):
            reader.try_read()
        writer.try_write(1, b"")
        waiting.join()


def test_signal_handlers_run_while_waiting() -> None:
    class Alarm(Exception):
        pass

    def ring_it(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring_it)
    try:
        with made(PAGE, 1) as (_, writer, [reader]):
            signal.setitimer(signal.ITIMER_REAL, 0.03)
            with pytest.raises(Alarm):
                reader.read()
            writer.try_write(1, bytes(writer.max_record))
            signal.setitimer(signal.ITIMER_REAL, 0.03)
            with pytest.raises(Alarm):
                writer.write(1, b"")
            assert reader.read(0.0) is not None and writer.try_write(1, b"")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_bell_rings_once_per_arming() -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    with made(PAGE, 2) as (_, writer, [reader, other]):
        writer.attach_eventfd(0, bell)
        writer.try_write(1, b"unarmed")
        assert reader.arm()  # a record is there already
        reader.try_read()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(bell)
        assert not reader.arm()
        for _ in range(5):
            writer.try_write(1, b"armed")
        assert os.eventfd_read(bell) == 1
        assert sum(reader.try_read() is not None for _ in range(10)) == 5
        assert sum(other.try_read() is not None for _ in range(10)) == 6
    os.close(bell)


# ---- several processes

CHECKER = """
import os, random, select, sys, time
from asyncengine._fast import ring
fd, index, seed, count, largest, bell = map(int, sys.argv[1:7])
mode = sys.argv[7]
reader = ring.RingReader(fd, index)
expected = random.Random(seed)
pace = random.Random(index)
poll = select.poll()
poll.register(bell, select.POLLIN)

def next_record():
    if mode == "futex":
        return reader.read(20)
    if mode == "spin":
        return reader.read(20, 200)
    while (record := reader.try_read()) is None:
        if not reader.arm():
            if not poll.poll(20_000):
                return None
            os.eventfd_read(bell)
    return record

for number in range(count):
    record = next_record()
    data = expected.randbytes(expected.randrange(largest + 1))
    if record != (number, data):
        sys.exit(f"reader {index}: record {number} is {record and (record[0], len(record[1]))}")
    if pace.random() < 0.002:
        time.sleep(0.002)
sys.exit(0 if reader.try_read() is None else "a record too many")
"""


@pytest.mark.parametrize(
    ("num_readers", "capacity", "largest", "count", "modes"),
    [
        (1, 1, PAGE - 8, 4000, ["futex"]),
        (1, 1, 60, 20_000, ["bell"]),
        (4, 1, 300, 6000, ["futex", "spin", "bell", "futex"]),
        (4, 65536, 3000, 6000, ["bell", "futex", "spin", "bell"]),
    ],
)
@pytest.mark.parametrize("blocking", [True, False])
def test_stress(
    num_readers: int, capacity: int, largest: int, count: int, modes: list[str], blocking: bool
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    fd = ring.create(capacity, num_readers)
    writer = ring.RingWriter(fd)
    bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(num_readers)]
    readers = []
    for index, (bell, mode) in enumerate(zip(bells, modes, strict=True)):
        writer.attach_eventfd(index, bell)
        numbers = map(str, (fd, index, seed, count, largest, bell))
        readers.append(subprocess.Popen([sys.executable, "-c", CHECKER, *numbers, mode], pass_fds=(fd, bell)))
    try:
        source = random.Random(seed)
        refused = 0
        for number in range(count):
            data = source.randbytes(source.randrange(largest + 1))
            if blocking:
                assert writer.write(number, data, 20.0)
            else:
                end = time.monotonic() + 20
                while not writer.try_write2(number, data[:5], data[5:]):
                    refused += 1
                    assert time.monotonic() < end
                    time.sleep(0.0001)
        assert [reader.wait(20) for reader in readers] == [0] * num_readers
        assert blocking or refused, "the ring was never full: the test is too easy"
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
        for open_fd in (fd, *bells):
            os.close(open_fd)


ECHO = """
import sys
from asyncengine._fast import ring
there, back = ring.RingReader(int(sys.argv[1]), 0), ring.RingWriter(int(sys.argv[2]))
back.attach_eventfd(0, int(sys.argv[3]))
while True:
    kind, data = there.read()
    if kind == 0:
        break
    back.write(kind, data)
"""


def test_no_wake_is_lost_in_ten_thousand_round_trips() -> None:
    # Both sides fall asleep in every round, so a wake-up that got lost would end in a time-out.
    there, back = ring.create(PAGE, 1), ring.create(PAGE, 1)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    fds = (there, back, bell)
    writer, reader = ring.RingWriter(there), ring.RingReader(back, 0)
    echo = subprocess.Popen([sys.executable, "-c", ECHO, *map(str, fds)], pass_fds=fds)
    poll = select.poll()
    poll.register(bell, select.POLLIN)
    try:
        for number in range(1, 10_001):
            assert writer.try_write(number, b"ping")
            if number % 2:
                assert reader.read(10) == (number, b"ping")
                continue
            while (record := reader.try_read()) is None:
                if not reader.arm():
                    assert poll.poll(10_000)
                    os.eventfd_read(bell)
            assert record == (number, b"ping")
        assert writer.try_write(0, b"")
        assert echo.wait(10) == 0
    finally:
        echo.kill()
        echo.wait()
        for fd in fds:
            os.close(fd)


def test_a_dead_reader_blocks_but_never_corrupts() -> None:
    with made(PAGE, 2) as (fd, writer, [reader, _]):
        child = subprocess.Popen(
            [sys.executable, "-c", CHECKER, *map(str, (fd, 1, 0, 10, 10, 0)), "futex"], pass_fds=(fd,)
        )
        child.kill()
        child.wait()
        written = 0
        while writer.try_write(written, b"x" * 100):
            written += 1
        assert not writer.write(0, b"x" * 100, 0.05)
        assert [reader.try_read() for _ in range(written + 1)] == [
            *((number, b"x" * 100) for number in range(written)),
            None,
        ]
        assert not writer.try_write(0, b"x" * 100)
