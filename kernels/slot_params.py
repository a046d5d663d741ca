"""What the sampler knows of a slot: one record of 32 words, which is one cache line.

A record is written as a whole when a sequence enters the slot, and never read outside of it. Vectors of
the vocabulary's length are too large to reserve for every slot: a record holds their device addresses, 0
where the sequence needs none.
"""

import struct

import triton.language as tl

__all__ = ["RECORD_BYTES", "RECORD_WORDS", "pack_record"]

RECORD_WORDS = 32
RECORD_BYTES = 4 * RECORD_WORDS

_LAYOUT = struct.Struct("<6Q fifffffii 44x")

# Offsets: of 64-bit fields in 8 bytes, of the others in 4.
SEED = tl.constexpr(0)
COUNTS = tl.constexpr(1)
PROMPT = tl.constexpr(2)
BIAS = tl.constexpr(3)
ALLOWED = tl.constexpr(4)
BANNED = tl.constexpr(5)
TEMPERATURE = tl.constexpr(12)
TOP_K = tl.constexpr(13)
TOP_P = tl.constexpr(14)
MIN_P = tl.constexpr(15)
PRESENCE = tl.constexpr(16)
FREQUENCY = tl.constexpr(17)
REPETITION = tl.constexpr(18)
NUM_LOGPROBS = tl.constexpr(19)
MIN_LEN = tl.constexpr(20)


def pack_record(
    *,
    seed: int = 0,
    counts: int = 0,
    prompt: int = 0,
    bias: int = 0,
    allowed: int = 0,
    banned: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    num_logprobs: int = -1,
    min_len: int = 0,
) -> bytes:
    """The record of a slot. Defaults are off; what the parameters do is in `_fast/cpu/sample.h`.

    Addresses: `counts` int32 [vocab], how often the output has each id, kept up by the sampler; `bias`
    float32 [vocab], added after penalties; and packed bits, id i in bit i % 32 of int32 word i // 32:
    `prompt` ids the prompt has, `allowed` the only ids that may be drawn, `banned` ids that cannot be
    drawn at positions below `min_len`.
    """
    return _LAYOUT.pack(
        seed,
        counts,
        prompt,
        bias,
        allowed,
        banned,
        temperature,
        top_k,
        top_p,
        min_p,
        presence,
        frequency,
        repetition,
        num_logprobs,
        min_len,
    )
