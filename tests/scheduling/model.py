"""Plain-Python references: a block pool, a language model that is a pure function, and a worker."""

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from asyncengine.scheduling.sequence import Sequence
from asyncengine.wire.plan import PLAN_HEADER, RELAY, SAMPLE, VERIFY, ResultDetails, RowLogprobs, SlotInit

VOCABULARY = 7
EOS = 0


def siphash128(key: bytes, data: bytes) -> bytes:
    """SipHash-2-4-128, from the paper's description on arbitrary-precision integers."""
    mask = 2**64 - 1
    k0, k1 = struct.unpack("<QQ", key)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]
    v[1] ^= 0xEE

    def rotate(x: int, b: int) -> int:
        return (x << b | x >> (64 - b)) & mask

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0] = (v[0] + v[1]) & mask
            v[2] = (v[2] + v[3]) & mask
            v[1] = rotate(v[1], 13) ^ v[0]
            v[3] = rotate(v[3], 16) ^ v[2]
            v[0] = rotate(v[0], 32)
            v[2] = (v[2] + v[1]) & mask
            v[0] = (v[0] + v[3]) & mask
            v[1] = rotate(v[1], 17) ^ v[2]
            v[3] = rotate(v[3], 21) ^ v[0]
            v[2] = rotate(v[2], 32)

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) & 0xFF])
    for (m,) in struct.iter_unpack("<Q", padded):
        v[3] ^= m
        rounds(2)
        v[0] ^= m
    v[2] ^= 0xEE
    rounds(4)
    low = v[0] ^ v[1] ^ v[2] ^ v[3]
    v[1] ^= 0xDD
    rounds(4)
    return struct.pack("<QQ", low, v[0] ^ v[1] ^ v[2] ^ v[3])


class ModelPool:
    """What a block pool is: lists and dicts, contents instead of hashes."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.free = list(range(num_blocks))
        self.refs = [0] * num_blocks
        self.content: dict[int, object] = {}
        self.index: dict[object, int] = {}

    def prefixes(self, tokens: list[int], salt: bytes) -> list[object]:
        full = len(tokens) // self.block_size
        return [(salt, tuple(tokens[: (i + 1) * self.block_size])) for i in range(full)]

    def allocate(self) -> int:
        if not self.free:
            return -1
        block = self.free.pop(0)
        self._forget(block)
        self.refs[block] = 1
        return block

    def _forget(self, block: int) -> None:
        if block in self.content:
            del self.index[self.content.pop(block)]

    def retain(self, block: int) -> None:
        if not self.refs[block]:
            self.free.remove(block)
        self.refs[block] += 1

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if not self.refs[block]:
            self.free.insert(len(self.free) if block in self.content else 0, block)

    def publish(self, block: int, prefix: object) -> None:
        if block not in self.content and prefix not in self.index:
            self.content[block] = prefix
            self.index[prefix] = block

    def match(self, tokens: list[int], salt: bytes) -> list[int]:
        found = []
        for prefix in self.prefixes(tokens[:-1], salt):
            if prefix not in self.index:
                break
            found.append(self.index[prefix])
        return found

    def reset(self) -> None:
        self.content.clear()
        self.index.clear()


# -- a language model whose keys and values are the hash of all they attend to ---------------------------


def kv(before: int, token: int, position: int) -> int:
    return hash((before, token, position))


def root(seq: Sequence) -> int:
    return hash(tuple(seq.cache_salt))


def draw(value: int, last: int, noise: int, length: int, min_len: int, stop_ids: Iterable[int]) -> int:
    """The next token after `length` tokens, the last of which is `last` with key and value `value`. Under
    half of all noises it goes round in a circle for most of the time, so that drafts are often right."""
    token = hash((value, noise)) % VOCABULARY
    if noise % 2 and hash((noise, value)) % 8:
        token = last % (VOCABULARY - 1) + 1
    while length < min_len and token in stop_ids:
        token += 1
    return token


@dataclass
class Truth:
    """A sequence run alone: its tokens and their keys and values, as far as anyone asks."""

    seq: Sequence
    tokens: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = self.seq.tokens.tolist()
        p = self.seq.params
        self.stops = [*p.stop_token_ids, *([] if p.ignore_eos else [EOS])]

    def extend(self, length: int) -> "Truth":
        """Up to `length` positions, also beyond the sequence's end."""
        while len(self.values) < length:
            i = len(self.values)
            if i == len(self.tokens):
                last, s = self.values[-1], self.seq
                token = draw(last, self.tokens[-1], s.noise, i, s.min_len, self.stops)
                self.tokens.append(token)
            self.values.append(kv(self.values[-1] if i else root(self.seq), self.tokens[i], i))
        return self

    def ending(self) -> tuple[list[int], str, int | None]:
        """The generated tokens with the reason and detail of the end."""
        s, p = self.seq, self.seq.params
        length = s.prompt_len
        while True:
            length += 1
            token = self.extend(length).tokens[length - 1]
            generated = self.tokens[s.prompt_len : length]
            if length > s.min_len and token == EOS and not p.ignore_eos:
                return generated, "stop", None
            if length > s.min_len and token in p.stop_token_ids:
                return generated, "stop", token
            if length == s.max_len:
                return generated, "length", None


# -- a worker --------------------------------------------------------------------------------------------


@dataclass
class Resident:
    init: SlotInit
    seq: Sequence
    table: dict[int, int] = field(default_factory=dict)
    next: int | None = None
    relay: tuple[int, int] | None = None


class Row(tuple[int, int, int, int]):
    slot = property(lambda self: self[0])
    start = property(lambda self: self[1])
    count = property(lambda self: self[2])
    flags = property(lambda self: self[3])


class Worker:
    """Executes plans literally, and compares every key and value that a row attends to with the truth."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.kv: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.slots: dict[int, Resident] = {}
        self.truth: dict[Sequence, Truth] = {}
        self.computed = 0
        self.steps = 0

    def parse(self, plan: bytes) -> tuple[list[int], list[Row], list, list, list[int], list[SlotInit]]:
        header = list(struct.unpack_from(f"<{PLAN_HEADER}i", plan))
        _, _, rows, tokens, updates, copies, payload, zero = header
        assert zero == 0
        at = 4 * PLAN_HEADER
        parts = []
        for count, width in ((rows, 4), (updates, 3), (copies, 2), (tokens, 1)):
            numbers = array("i", plan[at : at + 4 * count * width]).tolist()
            parts.append([Row(numbers[i : i + width]) for i in range(0, len(numbers), width)])
            at += 4 * count * width
        assert len(plan) == at + payload
        inits = msgspec.msgpack.decode(plan[at:], type=list[SlotInit]) if payload else []
        return header, parts[0], parts[1], parts[2], [t[0] for t in parts[3]], inits

    def execute(self, plan: bytes, admitted: list[Sequence], failing: set[int], details: bool) -> bytes:
        """The result of a plan. Sampled rows numbered in `failing` fail."""
        header, rows, updates, copies, inline, inits = self.parse(plan)
        assert [i.slot for i in inits] == [s.slot for s in admitted]
        for init, seq in zip(inits, admitted, strict=True):
            self.slots[init.slot] = Resident(init, seq)
            assert (init.seed, init.prompt_len) == (seq.noise, seq.prompt_len)
        for slot, index, block in updates:
            assert index == len(self.slots[slot].table)
            self.slots[slot].table[index] = block
        for source, target in copies:
            self.kv[target] = list(self.kv[source])
        assert sorted(rows, key=lambda r: not r.flags & RELAY) == rows
        assert len({r.slot for r in rows}) == len(rows)
        tokens: list[int] = []
        logprobs: dict[int, RowLogprobs] = {}
        failures: dict[int, str] = {}
        given = iter(inline)
        self.steps += 1
        for row in rows:
            resident = self.slots[row.slot]
            computed = self._compute(resident, row, given)
            assert row.flags in (0, SAMPLE, SAMPLE | RELAY, SAMPLE | VERIFY)
            count = row.count if row.flags & VERIFY else row.flags & SAMPLE
            for position, last, value in computed[row.count - count :]:
                i = resident.init
                token = draw(value, last, i.seed, position + 1, i.min_len, i.stop_ids)
                resident.relay = None if row.flags & VERIFY else (position + 1, token)
                if len(tokens) in failing:
                    failures[len(tokens)] = f"row of slot {row.slot}"
                    token = -1
                elif details:
                    logprobs[len(tokens)] = RowLogprobs(-float(token), 1, [], [])
                tokens.append(token)
        assert next(given, None) is None
        payload = b""
        if logprobs or failures:
            payload = msgspec.msgpack.encode(ResultDetails(logprobs, failures))
        head = struct.pack("<8i", header[0], header[1], len(tokens), len(payload), 17, 0, 0, 0)
        return head + array("i", tokens).tobytes() + payload

    def _compute(self, resident: Resident, row: Row, given: Iterable[int]) -> list[tuple[int, int, int]]:
        """Position, token, key and value of each of the row's positions."""
        bs, start = self.block_size, row.start
        assert row.count >= 1
        assert resident.next in (None, start), "a position is computed once, in order"
        right = True
        computed = []
        truth = self.truth.setdefault(resident.seq, Truth(resident.seq)).extend(start + row.count)
        value = root(resident.seq)
        for position in range(start):
            value = self.kv[resident.table[position // bs]][position % bs]
            assert value == truth.values[position], f"{resident.seq}: wrong memory at {position}"
        for position in range(start, start + row.count):
            if row.flags & RELAY:
                assert row.count == 1 and resident.relay is not None and resident.relay[0] == position
                token = resident.relay[1]
            else:
                token = next(given)
            # What is drafted may be wrong, and is then written over by the next row.
            right = right and token == truth.tokens[position]
            assert right or (row.flags & VERIFY and position > start), f"{resident.seq}: wrong at {position}"
            if right:
                resident.next = position + 1
            value = kv(value, token, position)
            self.kv[resident.table[position // bs]][position % bs] = value
            computed.append((position, token, value))
            self.computed += 1
        return computed
