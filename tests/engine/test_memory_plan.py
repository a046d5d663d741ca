"""The KV budget against sums worked out by hand, and its invariants over arbitrary machines."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncengine import OutOfMemoryError
from asyncengine.config import EngineConfig
from asyncengine.engine.memory_plan import CUDA_RESERVE, plan_blocks
from asyncengine.wire.stages import DeviceMemory, Profiled

GIB = 1 << 30
MIB = 1 << 20

CONFIG = EngineConfig(
    model="m", device="cuda", dtype="bfloat16", quantization=None, kv_dtype="bfloat16", max_model_len=8192,
    max_num_seqs=256, max_num_batched_tokens=8192, block_size=64, enable_prefix_caching=True,
    kv_cache_memory_bytes=None, gpu_memory_utilization=0.9, cpu_offload_bytes=0, enforce_eager=False,
    tensor_parallel_size=1, num_threads=1, seed=0, scheduling_policy="fcfs", max_queued_requests=None,
    max_queued_tokens=None, max_logprobs=20, speculative=None,
)  # fmt: skip


def config(**fields):
    return msgspec.structs.replace(CONFIG, **fields)


def gpu(total=80, start=79, weights=16, now=62, activations=2, graphs=1, per_block=8 * MIB):
    """GiB, but for `per_block`."""
    device = DeviceMemory(
        total_bytes=int(total * GIB),
        start_bytes=int(start * GIB),
        weight_bytes=int(weights * GIB),
        graph_bytes=int(graphs * GIB),
    )
    return Profiled(int(activations * GIB), per_block, int(now * GIB), device)


def test_by_hand():
    # 0.9 x 80 = 72 may be taken; 79 - 62 = 17 are; 2 + 1 more: 52 GiB are 52 x 128 blocks.
    assert plan_blocks(CONFIG, [gpu()], fixed_length=False) == 52 * 128


def test_a_cotenant_leaves_our_share_alone_while_there_is_room():
    # Half the GPU is taken by someone else. Our half is 0.5 x 80 = 40, of which 40 - 20 = 20 are taken.
    half = gpu(start=41, weights=20, now=21, activations=2, graphs=0)
    assert plan_blocks(config(gpu_memory_utilization=0.5), [half], fixed_length=False) == 18 * 128
    # With 0.9 we would get 72, but were there 41 free, which a reserve of 1/4 GiB bounds.
    blocks = plan_blocks(config(gpu_memory_utilization=0.9), [half], fixed_length=False)
    assert blocks == int((41 - 0.25 - 20 - 2) * 128)


def test_a_cotenant_that_leaves_meanwhile_does_not_add_to_our_share():
    gone = gpu(start=50, weights=16, now=60, activations=2, graphs=0)
    assert plan_blocks(CONFIG, [gone], fixed_length=False) == int((50 - 0.25 - 16 - 2) * 128)


def test_the_rank_with_the_least_decides():
    assert plan_blocks(CONFIG, [gpu(), gpu(now=52), gpu()], fixed_length=False) == 42 * 128


def test_kv_cache_memory_bytes_is_per_gpu_and_overrides_the_share():
    asked = config(kv_cache_memory_bytes=4 * GIB, gpu_memory_utilization=0.01)
    assert plan_blocks(asked, [gpu(), gpu()], fixed_length=False) == 4 * 128


def test_kv_cache_memory_bytes_beyond_what_is_free():
    # 79 - 0.25 - 17 - 2 - 1 = 58.75 GiB
    asked = config(kv_cache_memory_bytes=59 * GIB)
    with pytest.raises(OutOfMemoryError, match=rf"lower it to {int(58.75 * GIB):,} or less") as caught:
        plan_blocks(asked, [gpu()], fixed_length=False)
    for figure in ("80.00 GiB", "weights 16.00", "libraries 1.00", "activations 2.00", "graphs 1.00"):
        assert figure in str(caught.value)


def test_kv_cache_memory_bytes_too_small_for_one_sequence():
    asked = config(kv_cache_memory_bytes=GIB, max_model_len=16384)  # 128 blocks; 16,384 tokens take 256
    with pytest.raises(OutOfMemoryError, match=f"raise kv_cache_memory_bytes to {256 * 8 * MIB:,}"):
        plan_blocks(asked, [gpu()], fixed_length=True)
    assert plan_blocks(asked, [gpu()], fixed_length=False) == 128


@pytest.mark.parametrize(
    ("fields", "profile", "first"),
    [
        # 0.25 x 80 = 20, and 17 + 2 + 1 are taken: 128 blocks, 1 GiB, lack: 21 / 80 = 0.2625
        ({"gpu_memory_utilization": 0.25}, gpu(), "raise gpu_memory_utilization to 0.27"),
        # 0.5 GiB are left: 64 blocks
        ({"gpu_memory_utilization": 0.25625}, gpu(), "raise gpu_memory_utilization to 0.27, or lower"),
        # Free at the start and taken but for half a GiB: only shorter sequences or less of the rest helps.
        ({}, gpu(start=20.75, weights=16, now=3.75), "lower max_model_len to 4,096, or set enforce_eager"),
        # 1.25 GiB more than there are; 4 GiB of graphs would do.
        ({}, gpu(start=23.25, weights=17, now=6, graphs=4), "set enforce_eager=True"),
        ({}, gpu(start=23.25, weights=17, now=5, activations=5, graphs=0), "lower max_num_batched_tokens"),
    ],
)  # fmt: skip
def test_the_setting_that_would_do_is_named_first(fields, profile, first):
    with pytest.raises(OutOfMemoryError) as caught:
        plan_blocks(config(**fields), [profile], fixed_length=True)
    assert str(caught.value).split("); ")[-1].startswith(first)


def test_the_rank_is_named():
    with pytest.raises(OutOfMemoryError, match="rank 1"):
        plan_blocks(CONFIG, [gpu(), gpu(now=0.5)], fixed_length=False)


sizes = st.integers(0, 200 * GIB)


@given(
    profiles=st.lists(
        st.builds(
            lambda total, start, weights, now, activations, graphs, per_block: Profiled(
                activations,
                per_block,
                min(now, total),
                DeviceMemory(
                    total_bytes=total,
                    start_bytes=min(start, total),
                    weight_bytes=weights,
                    graph_bytes=graphs,
                ),
            ),
            st.integers(GIB, 200 * GIB), sizes, sizes, sizes, sizes, sizes, st.integers(1, 64 * MIB),
        ),
        min_size=1,
        max_size=3,
    ),
    utilization=st.floats(0.01, 1.0),
    wanted=st.none() | st.integers(1, 200 * GIB),
    fixed=st.booleans(),
)  # fmt: skip
def test_what_is_planned_fits_and_nothing_else_is_raised(profiles, utilization, wanted, fixed):
    made = config(gpu_memory_utilization=utilization, kv_cache_memory_bytes=wanted)
    try:
        blocks = plan_blocks(made, profiles, fixed_length=fixed)
    except OutOfMemoryError as error:
        assert "or " in str(error) or "lower" in str(error)
        return
    assert blocks >= (128 if fixed else 1)
    for profile in profiles:
        device = profile.device
        kv = blocks * profile.bytes_per_block
        ours = device.weight_bytes + profile.activation_bytes + device.graph_bytes + kv
        assert ours <= device.start_bytes - CUDA_RESERVE
        assert kv <= profile.available_bytes - profile.activation_bytes - device.graph_bytes
        if wanted is None:
            assert ours <= utilization * device.total_bytes + 1
        else:
            assert kv <= wanted


def test_cpu_by_hand():
    cpu = config(device="cpu", max_model_len=1024, max_num_seqs=4, block_size=32)
    # 0.9 x 2000 MiB - 100 MiB over all ranks = 1700 MiB, at 2 x 5 MiB a block; 4 x 32 blocks can be filled.
    profiles = [Profiled(50 * MIB, 5 * MIB, 2000 * MIB), Profiled(50 * MIB, 5 * MIB, 3000 * MIB)]
    assert plan_blocks(cpu, profiles, fixed_length=False) == 128
    more = msgspec.structs.replace(cpu, max_num_seqs=256)
    assert plan_blocks(more, profiles, fixed_length=False) == 170
    asked = msgspec.structs.replace(more, kv_cache_memory_bytes=1701 * MIB)
    with pytest.raises(OutOfMemoryError, match=f"that leaves {1700 * MIB:,}"):
        plan_blocks(asked, profiles, fixed_length=False)
