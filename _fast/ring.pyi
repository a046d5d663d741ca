"""A broadcast ring in anonymous shared memory (Linux): one writer, up to 64 readers.

Every reader gets every record, in order; the writer never overwrites what a reader has not taken.
A record is a kind (u32) and bytes; kinds mean nothing here. Descriptors stay the caller's: an
endpoint maps the segment when it is made and does not need the descriptor afterwards.
"""

from typing_extensions import Buffer

MAX_READERS: int

def create(capacity: int, num_readers: int) -> int:
    """Makes an empty ring and returns its descriptor (close-on-exec, mode 0600, sealed against resizing).

    `capacity` in bytes is rounded up to a power of two of at least one page. Raises ValueError for a
    capacity beyond 2 GiB or readers outside 1 to `MAX_READERS`, OSError where memory is refused.
    """

class RingWriter:
    """The one writer; of one thread at a time. Raises ValueError where `fd` is not a ring."""

    def __init__(self, fd: int) -> None: ...
    def try_write(self, kind: int, data: Buffer) -> bool:
        """Appends a record; False, with nothing written, while some reader has not made room.

        Raises ValueError for a record beyond `max_record`, which would never fit.
        """

    def try_write2(self, kind: int, a: Buffer, b: Buffer) -> bool:
        """`try_write` of one record whose bytes are those of `a`, then those of `b`."""

    def write(self, kind: int, data: Buffer, timeout: float | None = None) -> bool:
        """Appends a record, sleeping (without the GIL) for room; False after `timeout` seconds."""

    def attach_eventfd(self, reader_index: int, fd: int) -> None:
        """Makes `fd` (non-blocking) the bell of a reader that sleeps by `RingReader.arm`."""

    @property
    def max_record(self) -> int:
        """Most data bytes of one record."""

    @property
    def num_readers(self) -> int: ...
    def close(self) -> None:
        """Unmaps the ring; harmless twice. RuntimeError while another thread is in `write`."""

class RingReader:
    """Reader `index` of a ring; of one thread at a time. Raises ValueError where `fd` is not a ring."""

    def __init__(self, fd: int, index: int) -> None: ...
    def try_read(self) -> tuple[int, bytes] | None:
        """Takes the next record as (kind, data); None where there is none."""

    def read(self, timeout: float | None = None, spin_us: float = 0.0) -> tuple[int, bytes] | None:
        """Takes the next record, spinning `spin_us` microseconds for it, then sleeping; no GIL held.

        None after `timeout` seconds; `timeout=None` waits for ever. Signal handlers run meanwhile.
        """

    def arm(self) -> bool:
        """Asks for one write to the reader's eventfd at the next record.

        True where a record is there already: nothing was armed, read on. The writer must have been
        given the eventfd before.
        """

    def close(self) -> None:
        """Unmaps the ring; harmless twice. RuntimeError while another thread is in `read`."""
