"""What is settled when an engine starts: the device, and what follows from it."""

import logging

import msgspec
import pytest

from asyncengine import ConfigError, gpus
from asyncengine.args import EngineArgs
from asyncengine.checkpoint.spec import ModelSpec, WeightPacking
from asyncengine.config import resolve
from asyncengine.gpus import GPU, visible, visible_gpus

H200 = GPU("GPU-aaaa", "NVIDIA H200", 90, 141 << 30)
A100 = GPU("GPU-aabb", "NVIDIA A100", 80, 80 << 30)
T4 = GPU("GPU-cccc", "Tesla T4", 75, 16 << 30)

SPEC = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-5, hidden_act="silu", rope_theta=1e4,
    rope_scaling=None, max_position=4096, tie_embeddings=False, qkv_bias=False, output_bias=False,
    mlp_bias=False, qk_norm=False, sliding_windows=(0, 0), dtype="bfloat16", bos_token_id=1,
    eos_token_ids=(2,),
)  # fmt: skip


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """As if torch with CUDA and Triton were installed."""
    monkeypatch.setattr(gpus, "_missing_packages", lambda: None)


def made(found=(H200,), spec=SPEC, is_gguf=False, **fields):
    return resolve(EngineArgs(model="m", **fields), spec, is_gguf=is_gguf, gpus=found)


def test_auto_takes_a_gpu_that_is_there():
    config = made()
    assert (config.device, config.dtype, config.kv_dtype) == ("cuda", "bfloat16", "bfloat16")
    assert (config.block_size, config.max_num_batched_tokens) == (64, 8192)
    assert (config.quantization, config.speculative) == (None, None)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_one_it_is_the_cpu(device):
    config = made((), device=device)
    assert (config.device, config.block_size, config.max_num_batched_tokens) == ("cpu", 32, 512)


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1)])
def test_ranks_share_the_cores(monkeypatch, cores, ranks, threads):
    monkeypatch.setattr("asyncengine.config.usable_cores", lambda: cores)
    spec = msgspec.structs.replace(SPEC, num_heads=24, num_kv_heads=24, intermediate_size=192)
    assert made((), spec, tensor_parallel_size=ranks).num_threads == threads
    assert made((), spec, tensor_parallel_size=ranks, num_threads=12).num_threads == 12 // ranks


def test_cpu_is_cpu_whatever_is_there():
    assert made((H200,), device="cpu").device == "cpu"


@pytest.mark.parametrize(
    ("found", "missing", "reason"),
    [
        ((), None, "no NVIDIA GPU was found"),
        ((T4,), None, r"Tesla T4 has compute capability 7\.5, and 8\.0"),
        ((H200,), "torch is not installed", r"pip install 'asyncengine\[cuda\]'"),
    ],
)
def test_cuda_without_a_usable_gpu_is_refused(monkeypatch, caplog, found, missing, reason):
    monkeypatch.setattr(gpus, "_missing_packages", lambda: missing)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=reason) as caught:
        made(found, device="cuda")
    assert caught.value.parameter == "device" and "device='cpu'" in str(caught.value)
    with caplog.at_level(logging.WARNING, "asyncengine"):
        assert made(found).device == "cpu"
    assert bool(caplog.records) == bool(found)  # a GPU that stays idle is worth a line


def test_hidden_gpus_are_told(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=''"):
        made((), device="cuda")


@pytest.mark.parametrize(
    ("fields", "instead"),
    [
        ({"quantization": "int8"}, "device='cpu'"),
        ({"quantization": "gguf"}, "device='cpu'"),
        ({"speculative": {"method": "ngram"}}, "device='cpu'"),
        ({"block_size": 8}, "64, 32, 16"),
        ({"kv_cache_dtype": "int8"}, "'fp8'"),
        ({"kv_cache_dtype": "float16"}, "'fp8'"),
        ({"tensor_parallel_size": 2}, "1 are visible"),
        ({"cpu_offload_gb": -1}, "0 or more"),
        ({"cpu_offload_gb": float("inf")}, "finite"),
    ],
)
def test_refused_on_cuda(fields, instead):
    with pytest.raises(ConfigError, match=instead) as caught:
        made(**fields)
    assert caught.value.parameter in fields


@pytest.mark.parametrize(
    "fields", [{"cpu_offload_gb": 1}, {"disable_custom_all_reduce": True}, {"kv_cache_dtype": "fp8"}]
)
def test_refused_on_a_cpu(fields):
    with pytest.raises(ConfigError, match="not supported on device 'cpu'") as caught:
        made((), **fields)
    assert caught.value.parameter in fields


def test_served_on_cuda():
    config = made((H200, A100), tensor_parallel_size=2, cpu_offload_gb=1.5, disable_custom_all_reduce=True)
    assert config.cpu_offload_bytes == 3 << 29
    assert made(kv_cache_dtype="fp8").kv_dtype == made(kv_cache_dtype="fp8_e4m3").kv_dtype == "fp8_e4m3"
    assert made(block_size=16).block_size == 16


def test_dtype():
    float32 = msgspec.structs.replace(SPEC, dtype="float32")
    assert made(spec=float32).dtype == "bfloat16"
    assert made(spec=float32, dtype="float32").dtype == "float32"
    assert made((), spec=float32).dtype == "float32"
    packed = msgspec.structs.replace(SPEC, dtype=None)
    on_gpu, on_cpu = made(spec=packed, is_gguf=True), made((), spec=packed, is_gguf=True)
    assert (on_gpu.dtype, on_gpu.quantization) == ("bfloat16", None)
    assert (on_cpu.dtype, on_cpu.quantization) == ("bfloat16", "gguf")


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
def test_quantized_checkpoints(method):
    """As stored on a CPU, unless told otherwise; not on a GPU."""
    spec = msgspec.structs.replace(
        SPEC, dtype="float16", packing=WeightPacking(method=method, bits=4, group_size=128)
    )
    for fields, expected in (
        ({}, ("float16", method)),
        ({"dtype": "bfloat16"}, ("bfloat16", None)),
        ({"dtype": "bfloat16", "quantization": method}, ("bfloat16", method)),
        ({"quantization": "int8"}, ("float16", "int8")),
        ({"load_format": "dummy"}, ("float16", None)),
    ):
        config = made((), spec=spec, **fields)
        assert (config.dtype, config.quantization) == expected
    with pytest.raises(ConfigError, match=f"{method} checkpoints are not supported; use device='cpu'"):
        made(spec=spec)
    other = "awq" if method == "gptq" else "gptq"
    for fields, needed in (
        ({"quantization": other}, f"checkpoint quantized with {other}"),
        ({"quantization": "gguf"}, "GGUF file"),
        ({"quantization": method, "load_format": "dummy"}, f"checkpoint quantized with {method}"),
    ):
        with pytest.raises(ConfigError, match=f"needs a {needed}; other checkpoints take") as caught:
            made((), spec=spec, **fields)
        assert caught.value.parameter == "quantization"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, (H200, A100, T4)),
        ("", ()),
        ("-1", ()),
        ("1", (A100,)),
        ("2, 0", (T4, H200)),
        ("0,7,1", (H200,)),  # what follows an unknown one is ignored, as CUDA does
        ("GPU-cc,GPU-aaaa", (T4, H200)),
        ("GPU-aa", ()),  # two of them begin so
        ("1,1", (A100,)),
    ],
)
def test_visible_devices(value, expected):
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert tuple(visible((H200, A100, T4), environment)) == expected


def test_the_driver_can_be_asked_anywhere():
    assert all(gpu.memory > 0 and gpu.capability >= 30 for gpu in visible_gpus())
