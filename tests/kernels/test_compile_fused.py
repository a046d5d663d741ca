"""Every kernel but attention, in its shipped configurations, compiled for GPUs that need not be there.

The compiler needs the functions that the interpreter replaces, so it runs in a process of its own: this
file as a script, with the compute capability as its argument.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", SHARED)
def test_no_spills_and_little_shared_memory(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    assert len(results) > 15
    for name, (stack, shared) in results.items():
        assert stack == 0, name
        assert shared <= SHARED[capability], name


def cases(capability: int) -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any]]]:
    """Name, configuration, kernel, types that differ from int32 pointers, constants."""
    import triton

    from asyncengine.kernels.activation import gated_kernel
    from asyncengine.kernels.batch_update import batch_update_kernel
    from asyncengine.kernels.configs import config_of
    from asyncengine.kernels.rms_norm import rms_norm_kernel
    from asyncengine.kernels.rope_kv import rope_kv_kernel
    from asyncengine.kernels.sampler_pick import pick_kernel
    from asyncengine.kernels.sampler_scan import scan_kernel

    half, single = "*bf16", "*fp32"
    norm = {"out": half, "x": half, "residual": half, "weight": half, "eps": "fp32"}
    for width in (1024, 4096, 16384):
        for add in (False, True):
            block = triton.next_power_of_2(width)
            constants = {"WIDTH": width, "BLOCK": block, "ADD": add}
            yield f"rms_norm {width} {add}", "rms_norm", rms_norm_kernel, norm, constants

    block = config_of("gated", capability).block["BLOCK"]
    for activation in ("silu", "gelu", "gelu_tanh"):
        constants = {"WIDTH": 14336, "BLOCK": block, "ACTIVATION": activation}
        yield f"gated {activation}", "gated", gated_kernel, {"out": half, "gate_up": half}, constants

    heads = config_of("rope_kv", capability).block["BLOCK_HEADS"]
    for dim, with_norm, e4m3 in (
        (64, False, False),
        (80, False, False),
        (128, False, False),
        (128, True, True),
        (256, True, False),
    ):
        cache = "*u8" if e4m3 else half
        types = dict.fromkeys(("qkv", "q_weight", "k_weight"), half) | {"k_cache": cache, "v_cache": cache}
        types |= dict.fromkeys(("cos_sin", "k_scale", "v_scale"), single)
        types |= {"table_stride": "i32", "eps": "fp32"}
        constants = {"Q_HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": dim, "BLOCK_SIZE": 64, "BLOCK_HEADS": heads}
        constants |= {"BLOCK_HALF": triton.next_power_of_2(dim // 2), "NORM": with_norm}
        constants |= {"SCALED": e4m3, "E4M3": e4m3}
        yield f"rope_kv {dim} {with_norm} {e4m3}", "rope_kv", rope_kv_kernel, types, constants

    block = config_of("batch_update", capability).block["BLOCK"]
    for rows in (256, 1024):
        constants = {"MAX_ROWS": rows, "WORDS": 32, "BLOCK": block}
        types = {"table_stride": "i32"}
        yield f"batch_update {rows}", "batch_update", batch_update_kernel, types, constants

    block = config_of("sampler_scan", capability).block["BLOCK"]
    for logits in (half, single):
        types = dict.fromkeys(("tiles", "maxima", "listed", "logprob", "top_logprobs"), single)
        types |= dict.fromkeys(("stride", "vocab", "num_tiles", "room"), "i32") | {"logits": logits}
        yield f"sampler_scan {logits}", "sampler_scan", scan_kernel, types, {"BLOCK": block}
    # The one kernel that takes long: all sizes on the newest architecture, one on the others.
    for vocab in {80: [49_152], 89: [128_256], 90: [128_256, 262_144]}[capability]:
        tiles = triton.cdiv(vocab, block)
        constants = {"NUM_TOP": 20, "BLOCK": block, "MAX_TILES": triton.next_power_of_2(tiles)}
        constants |= {"MAX_GROUPS": triton.next_power_of_2(tiles * block // 64)}
        yield f"sampler_pick {vocab}", "sampler_pick", pick_kernel, types, constants


def compile_all(capability: int) -> dict[str, tuple[int, int]]:
    from asyncengine.kernels.aot import compile
    from asyncengine.kernels.configs import config_of

    results = {}
    for name, config, kernel, types, constants in cases(capability):
        signature = {n: types.get(n, "*i32") for n in kernel.arg_names if n not in constants}
        divisible = signature.keys() & {"stride", "vocab", "room", "table_stride"}
        options = config_of(config, capability).options
        built = compile(kernel, signature, constants, capability, divisible=divisible, **options)
        results[name] = (built.stack, built.shared)
    return results


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
