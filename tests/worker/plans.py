"""Plans made by hand, after the layout in `wire/plan.py`, and a minimal driver of runners."""

import struct
from dataclasses import dataclass, field

import msgspec

from asyncengine.wire.plan import RELAY, SAMPLE, VERIFY, ResultDetails, SlotInit


def slot_init(slot, prompt_len, **fields):
    defaults = dict(
        seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
        repetition_penalty=1.0, logprobs=-1, min_len=0, stop_ids=[], history=None,
    )  # fmt: skip
    return SlotInit(slot=slot, prompt_len=prompt_len, **(defaults | fields))


@dataclass
class PlanBuilder:
    epoch: int = 1
    step: int = 0
    rows: list = field(default_factory=list)
    updates: list = field(default_factory=list)
    copies: list = field(default_factory=list)
    tokens: list = field(default_factory=list)
    inits: list = field(default_factory=list)

    def relay(self, slot, start, sample=True):
        self.rows.append((slot, start, 1, RELAY | (SAMPLE if sample else 0)))

    def inline(self, slot, start, tokens, sample):
        self.rows.append((slot, start, len(tokens), SAMPLE if sample else 0))
        self.tokens += tokens

    def verify(self, slot, start, tokens):
        """Samples after every one of `tokens`."""
        self.rows.append((slot, start, len(tokens), SAMPLE | VERIFY))
        self.tokens += tokens

    def encode(self):
        payload = msgspec.msgpack.encode(self.inits) if self.inits else b""
        header = (
            self.epoch,
            self.step,
            len(self.rows),
            len(self.tokens),
            len(self.updates),
            len(self.copies),
        )
        words = [*header, len(payload), 0]
        for part in (self.rows, self.updates, self.copies):
            words += [word for item in part for word in item]
        return struct.pack(f"<{len(words) + len(self.tokens)}i", *words, *self.tokens) + payload


@dataclass
class Result:
    epoch: int
    step: int
    tokens: list
    details: ResultDetails | None


def decode_result(data):
    epoch, step, sampled, payload, _, *_ = struct.unpack_from("<8i", data)
    tokens = list(struct.unpack_from(f"<{sampled}i", data, 32))
    assert len(data) == 32 + 4 * sampled + payload
    details = msgspec.msgpack.decode(data[32 + 4 * sampled :], type=ResultDetails) if payload else None
    return Result(epoch, step, tokens, details)


class Driver:
    """Greedy or sampled generation of several sequences, driven by plans; one slot per sequence.

    Blocks are handed out in a scattered order, so that a runner which ignores its table fails.
    """

    def __init__(self, step, num_blocks, block_size):
        self.run = step
        self.block_size = block_size
        self.free = [block for parity in (1, 0) for block in range(num_blocks) if block % 2 == parity]
        self.tables = {}
        self.step = 0
        self.details = []

    def extend(self, plan, slot, length):
        table = self.tables.setdefault(slot, [])
        while len(table) * self.block_size < length:
            table.append(self.free.pop())
            plan.updates.append((slot, len(table) - 1, table[-1]))

    def send(self, plan):
        plan.step = self.step
        self.step += 1
        result = decode_result(self.run(plan.encode()))
        assert (result.epoch, result.step) == (plan.epoch, plan.step)
        self.details.append(result.details)
        return result.tokens

    def generate(self, prompts, count, chunk=None, stagger=0, relay=True, **fields):
        """`prompts` (slot -> ids) in one batch: tokens drawn per slot. Sequence i enters at step i * stagger;
        prompts are computed in chunks; `relay=False` sends every token inline."""
        known = {slot: list(ids) for slot, ids in prompts.items()}
        computed = dict.fromkeys(known, 0)
        entry = {slot: i * stagger for i, slot in enumerate(known)}
        clock = 0
        while any(len(known[s]) < len(prompts[s]) + count for s in known):
            plan = PlanBuilder()
            sampled = []
            running = [s for s in known if entry[s] <= clock and len(known[s]) < len(prompts[s]) + count]
            decoding = [s for s in running if relay and computed[s] == len(known[s]) - 1 >= len(prompts[s])]
            for slot in decoding + [s for s in running if s not in decoding]:
                if computed[slot] == 0:
                    history = known[slot] if fields.get("repetition_penalty", 1.0) != 1.0 else None
                    plan.inits.append(slot_init(slot, len(prompts[slot]), **({"history": history} | fields)))
                if slot in decoding:
                    take, sample = 1, True
                    plan.relay(slot, computed[slot])
                else:
                    take = min(chunk or 10**9, len(known[slot]) - computed[slot])
                    sample = computed[slot] + take == len(known[slot])
                    plan.inline(
                        slot, computed[slot], known[slot][computed[slot] : computed[slot] + take], sample
                    )
                computed[slot] += take
                self.extend(plan, slot, computed[slot])
                if sample:
                    sampled.append(slot)
            for slot, token in zip(sampled, self.send(plan), strict=True):
                known[slot].append(token)
            clock += 1
        return {slot: known[slot][len(prompts[slot]) :] for slot in known}
