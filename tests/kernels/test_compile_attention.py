"""Attention in its shipped configurations, compiled for GPUs that need not be there.

As in `test_compile_fused.py`, in a process of its own: this file as a script, with the compute capability
as its argument.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
FUSED = {"WINDOW": 1024, "SINKS": True}
CAPPED = {"WINDOW": 4096, "SOFT_CAP": 50.0}
E4M3 = {"E4M3": True, "SCALED": True}
SHORT = 12
"""Query tokens that make half a tile of prefill, with 4 heads each."""


@pytest.mark.parametrize("capability", SHARED)
def test_what_the_compiler_makes(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    assert len(results) > 9
    for name, (stack, shared, sass) in results.items():
        assert stack == 0 or "float32" in name, (name, stack)
        assert shared <= SHARED[capability], (name, shared)
        # Keys and values are copied to shared memory behind the computation.
        assert sass.get("LDGSTS", 0) >= 12, name
        mma = "HGMMA" if capability == 90 and "prefill" in name else "HMMA"
        assert sass.get(mma, 0) >= 16, (name, mma)


def cases(capability: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Query tokens and constants. The variants are shared out among architectures."""
    for head_dim in (64, 128, 256):
        for tokens in (1, 4096):
            yield tokens, {"HEAD_DIM": head_dim}
    for tokens in (1, 4096):
        yield tokens, {"HEAD_DIM": 128, **E4M3}
    yield 8, {"HEAD_DIM": 128}
    if capability == 80:
        yield SHORT, {"HEAD_DIM": 256}
        yield 4096, {"HEAD_DIM": 256, **CAPPED}
        yield 1, {"HEAD_DIM": 80}
    if capability == 89:
        yield 4096, {"HEAD_DIM": 64, **FUSED}
        yield 8, {"HEAD_DIM": 128, "BLOCK_SIZE": 16}
        yield 4096, {"HEAD_DIM": 128, "wide": True}
    if capability == 90:
        for head_dim in (128, 256):
            yield SHORT, {"HEAD_DIM": head_dim}
        for tokens in (1, 4096):
            yield tokens, {"HEAD_DIM": 64, "GROUP": 8, **FUSED}
            yield tokens, {"HEAD_DIM": 256, **CAPPED}
        yield 4096, {"HEAD_DIM": 112, "ALIBI": True}
        yield 1, {"HEAD_DIM": 128, "BLOCK_SIZE": 16}


def compile_all(capability: int) -> dict[str, tuple[int, int, dict[str, int]]]:
    from asyncengine.kernels.aot import compile
    from asyncengine.kernels.attention_decode import decode_kernel
    from asyncengine.kernels.attention_prefill import prefill_kernel
    from asyncengine.kernels.configs import config_of
    from asyncengine.kernels.paged_attention import launch_of

    results = {}
    for tokens, constants in cases(capability):
        shape = {"BLOCK_SIZE": 64, "KV_HEADS": 8, "GROUP": 4, **constants}
        launch = launch_of(partial(config_of, capability=capability), tokens, **shape)
        kernel = decode_kernel if launch.decode else prefill_kernel
        value = "*fp32" if constants.get("wide") else "*bf16"
        cached = ("*u8" if capability < 89 else "*fp8e4nv") if constants.get("E4M3") else value
        types = dict.fromkeys(kernel.arg_names, "*i32")
        types |= {"qkv": value, "out": value, "k_cache": cached, "v_cache": cached, "scale": "fp32"}
        types |= dict.fromkeys(("slopes", "sinks", "k_scale", "v_scale"), "*fp32")
        types |= dict.fromkeys(("partial", "partial_sums"), "*fp32")
        strides = {"qkv_stride", "out_stride", "k_stride", "v_stride", "table_stride"}
        types |= dict.fromkeys(strides | {"first_row", "num_rows"}, "i32")
        spec = launch.spec
        absent = {"slopes": not spec.ALIBI, "sinks": not spec.SINKS}
        absent |= dict.fromkeys(("k_scale", "v_scale"), not spec.SCALED)
        known = {"S": spec} | {name: None for name in absent if absent[name]}
        signature = {name: types[name] for name in kernel.arg_names if name not in known}
        built = compile(kernel, signature, known, capability, divisible=strides, **launch.options)
        name = f"{'decode' if launch.decode else 'prefill'} {tokens} {constants}"
        name += " float32" * constants.get("wide", False)
        results[name] = (built.stack, built.shared, built.sass)
    return results


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
