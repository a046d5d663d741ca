"""What the sampler must know of the sequences in slots: records, and vectors of the vocabulary's length."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.kernels.slot_params import RECORD_BYTES, RECORD_WORDS, pack_record

from ...wire.plan import SlotInit
from .device import Device

__all__ = ["RECORD_STRIDE", "Slots"]

Ints = NDArray[np.int32]

RECORD_STRIDE = 1 + RECORD_WORDS
"""Words of a record in a plan: the slot, then the record."""


class Slots:
    """The host's knowledge of slots, and the vectors on the device whose addresses the records hold."""

    def __init__(self, device: Device, slots: int, vocab_size: int) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._bit_words = -(-vocab_size // 32)
        self._vectors: dict[int, torch.Tensor] = {}
        self.num_logprobs = np.full(slots, -1, np.int32)

    @property
    def vector_bytes(self) -> int:
        """Most bytes that one slot's vectors take."""
        return 4 * (self._vocab_size + 2 * self._bit_words)

    def enter(self, inits: Sequence[SlotInit]) -> Ints:
        """Sequences take slots; nothing of the last ones remains. Their records, [n, RECORD_STRIDE]."""
        last = {init.slot: init for init in inits}
        words = np.empty((len(last), RECORD_STRIDE), np.int32)
        for row, init in zip(words, last.values(), strict=True):
            row[0] = init.slot
            row[1:] = np.frombuffer(self._record(init), np.int32, RECORD_BYTES // 4)
            self.num_logprobs[init.slot] = init.logprobs
        return words

    def _record(self, init: SlotInit) -> bytes:
        parts: dict[str, Ints] = {}
        if (init.presence_penalty, init.frequency_penalty, init.repetition_penalty) != (0.0, 0.0, 1.0):
            if init.history is None:
                raise ValueError(f"slot {init.slot} has penalties but no history")
            # After a preemption the history holds generated tokens too: they count as such.
            generated = init.history[init.prompt_len :]
            parts["counts"] = np.bincount(generated, minlength=self._vocab_size).astype(np.int32)
            parts["prompt"] = self._bits(init.history[: init.prompt_len])
        if init.stop_ids and init.min_len > init.prompt_len:
            parts["banned"] = self._bits([i for i in init.stop_ids if 0 <= i < self._vocab_size])
        return pack_record(
            seed=init.seed,
            temperature=init.temperature,
            top_k=init.top_k,
            top_p=init.top_p,
            min_p=init.min_p,
            presence=init.presence_penalty,
            frequency=init.frequency_penalty,
            repetition=init.repetition_penalty,
            num_logprobs=init.logprobs,
            min_len=init.min_len if "banned" in parts else 0,
            **self._send(init.slot, parts),
        )

    def _bits(self, ids: Sequence[int]) -> Ints:
        bits = np.zeros(32 * self._bit_words, np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def _send(self, slot: int, parts: dict[str, Ints]) -> dict[str, int]:
        """Puts vectors on the device in place of the slot's last ones; their addresses."""
        # The compute stream's own order keeps the memory of the last ones until nothing uses them.
        self._vectors.pop(slot, None)
        if not parts:
            return {}
        words = np.concatenate(list(parts.values()))
        self._vectors[slot] = vector = self._device.send(words)
        starts = np.cumsum([0, *(len(part) for part in parts.values())]).tolist()
        return {name: vector.data_ptr() + 4 * start for name, start in zip(parts, starts, strict=False)}
