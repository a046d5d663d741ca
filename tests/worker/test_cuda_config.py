"""What the CUDA backend refuses, and what it says then."""

import subprocess
import sys
import textwrap

import msgspec
import pytest
import torch

from asyncengine.checkpoint.spec import WeightPacking
from asyncengine.errors import ConfigError, ModelLoadError
from asyncengine.worker.cuda.graphs import graph_sizes
from asyncengine.worker.runner import Runner

from .cuda_host import SIZES
from .test_rope import make_spec
from .tiny import worker_config

FIELDS = {name: value for name, value in SIZES.items() if name != "num_blocks"}


def configure(spec=None, **fields):
    config = worker_config(spec or make_spec("default"), "unused", **(FIELDS | fields))
    Runner(0, 1, {}).run_stage("config", msgspec.msgpack.encode(config), lambda *_: None)


@pytest.mark.parametrize(
    ("parameter", "fields", "instead"),
    [
        ("quantization", {"quantization": "gguf"}, "leave it None"),
        ("quantization", {"quantization": "int4"}, "device='cpu'"),
        ("kv_cache_dtype", {"kv_dtype": "int8"}, "'fp8'"),
        ("kv_cache_dtype", {"kv_dtype": "float16"}, "'auto'"),
        ("speculative", {"max_num_samples": 9}, "device='cpu'"),
    ],
)
def test_what_is_not_supported_is_refused(parameter, fields, instead):
    with pytest.raises(ConfigError, match=instead) as caught:
        configure(**fields)
    assert caught.value.parameter == parameter


def test_quantized_checkpoints_are_refused():
    packing = WeightPacking(method="awq", bits=4, group_size=128)
    with pytest.raises(ConfigError, match=r"awq checkpoints are not supported.*device='cpu'") as caught:
        configure(msgspec.structs.replace(make_spec("default"), packing=packing))
    assert caught.value.parameter == "device"


@pytest.mark.parametrize("head_dim", [33, 320])
def test_head_sizes(head_dim):
    with pytest.raises(ModelLoadError, match=f"size {head_dim}"):
        configure(make_spec("default", head_dim=head_dim))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(ConfigError, match=r"no usable GPU.*device='cpu'") as caught:
        configure()
    assert caught.value.parameter == "device"


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_without_a_package(package):
    """A missing package is named with what to install; the CPU does not load it."""
    code = f"""
        import sys
        sys.modules[{package!r}] = None
        import msgspec
        from asyncengine.errors import ConfigError
        from asyncengine.worker.runner import Runner
        runner = Runner(0, 1, {{}})
        try:
            runner.run_stage("config", sys.stdin.buffer.read(), None)
        except ConfigError as error:
            assert error.parameter == "device"
            print(error)
    """
    config = worker_config(make_spec("default"), "unused", **FIELDS)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=msgspec.msgpack.encode(config),
        capture_output=True,
        check=True,
    )
    assert f"the package '{package}'" in done.stdout.decode()
    assert "pip install 'asyncengine[cuda]'" in done.stdout.decode()


def test_graph_sizes():
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(30) == [1, 2, 4, 8, 16, 24, 30]
    assert graph_sizes(256) == [1, 2, 4, *range(8, 257, 8)]
    assert graph_sizes(330) == [1, 2, 4, *range(8, 257, 8), 288, 320, 330]
