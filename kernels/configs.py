"""How each kernel is launched, by compute capability."""

from functools import cache
from typing import NamedTuple

import torch

__all__ = ["CONFIGS", "Config", "config", "config_of", "get_config"]


class Config(NamedTuple):
    """Block sizes and compiler options of one launch."""

    block: dict[str, int]
    options: dict[str, int]


def config(**numbers: int) -> Config:
    """Block sizes are those in capitals."""
    block = {name: value for name, value in numbers.items() if name.isupper()}
    return Config(block, {name: value for name, value in numbers.items() if name not in block})


# Entries without a device above them were chosen by reasoning and ahead-of-time compiles: nobody has timed
# them. On the GPU they are for,
#     python benchmarks/tune.py
# times what it could be instead and rewrites its capability's entries; what is known of the choices:
# - An entry serves all capabilities up to the next one: 8.0's must fit the 99 KiB of 8.6 and 8.9.
# - sampler_pick: left to itself ptxas takes 128 registers and spills.
# - attention, by head size. decode: PROGRAMS run at once on a multiprocessor, and maxnreg is what they
#   leave each other; left to itself ptxas spills before that. MAX_M lines where 16 are not enough.
# - prefill: SHORT_WARPS work on tiles of half as many lines.
CONFIGS: dict[str, dict[int, Config]] = {
    "rms_norm": {
        80: config(num_warps=8),
    },
    "gated": {
        80: config(BLOCK=1024, num_warps=4),
    },
    "rope_kv": {
        80: config(BLOCK_HEADS=8, num_warps=4),
    },
    "batch_update": {
        80: config(BLOCK=256, num_warps=4),
    },
    "sampler_scan": {
        80: config(BLOCK=2048, num_warps=8),
    },
    "sampler_pick": {
        80: config(num_warps=8, maxnreg=224),
    },
    "attention_decode_64": {
        80: config(MAX_M=32, BLOCK_N=64, MIN_TILES=2, PROGRAMS=2, num_warps=4, num_stages=3, maxnreg=255),
        90: config(MAX_M=32, BLOCK_N=64, MIN_TILES=2, PROGRAMS=3, num_warps=4, num_stages=4, maxnreg=168),
    },
    "attention_decode_128": {
        80: config(MAX_M=32, BLOCK_N=64, MIN_TILES=2, PROGRAMS=2, num_warps=4, num_stages=2, maxnreg=255),
        90: config(MAX_M=32, BLOCK_N=64, MIN_TILES=2, PROGRAMS=2, num_warps=4, num_stages=3, maxnreg=255),
    },
    "attention_decode_256": {
        80: config(MAX_M=16, BLOCK_N=32, MIN_TILES=2, PROGRAMS=2, num_warps=4, num_stages=2, maxnreg=255),
        90: config(MAX_M=16, BLOCK_N=32, MIN_TILES=2, PROGRAMS=2, num_warps=4, num_stages=3, maxnreg=255),
    },
    "attention_prefill_64": {
        80: config(BLOCK_M=128, BLOCK_N=64, SHORT_WARPS=4, num_warps=8, num_stages=3),
        90: config(BLOCK_M=128, BLOCK_N=64, SHORT_WARPS=4, num_warps=8, num_stages=3),
    },
    "attention_prefill_128": {
        80: config(BLOCK_M=128, BLOCK_N=32, SHORT_WARPS=4, num_warps=8, num_stages=3),
        90: config(BLOCK_M=128, BLOCK_N=64, SHORT_WARPS=4, num_warps=8, num_stages=3),
    },
    "attention_prefill_256": {
        80: config(BLOCK_M=64, BLOCK_N=32, SHORT_WARPS=4, num_warps=8, num_stages=2),
        90: config(BLOCK_M=128, BLOCK_N=32, SHORT_WARPS=8, num_warps=8, num_stages=3),
    },
}


def config_of(kernel: str, capability: int) -> Config:
    """The configuration of the newest capability that is not above `capability`."""
    known = CONFIGS[kernel]
    return known[max(which for which in known if which <= capability)]


@cache
def get_config(kernel: str, device: torch.device) -> Config:
    """The configuration for `device`; the oldest one where the interpreter runs on the CPU."""
    if device.type != "cuda":
        return config_of(kernel, 80)
    major, minor = torch.cuda.get_device_capability(device)
    return config_of(kernel, 10 * major + minor)
