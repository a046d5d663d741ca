"""What the compiler makes of a workload's launches in a configuration, without a GPU."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from asyncengine.kernels import configs
from asyncengine.kernels.aot import compile

from .grids import GRIDS, Numbers, max_shared
from .workloads import Workload

__all__ = ["Build", "builds", "flaw", "using"]

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


class Build(NamedTuple):
    kernel: str
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread."""
    shared: int
    """Bytes per program."""


@contextmanager
def using(kernel: str, numbers: Numbers, capability: int) -> Iterator[None]:
    """Has `kernel` launched with `numbers` and the others as they are shipped for `capability`, on any
    device."""
    shipped = dict(configs.CONFIGS)
    # Entries of the oldest capability serve all that have none of their own.
    for name in shipped:
        configs.CONFIGS[name] = {80: configs.config_of(name, capability)}
    configs.CONFIGS[kernel] = {80: configs.config(**numbers)}
    configs.get_config.cache_clear()
    try:
        yield
    finally:
        configs.CONFIGS.update(shipped)
        configs.get_config.cache_clear()


class _Launch(NamedTuple):
    """What a kernel is compiled from, as Triton's launcher would have it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: set[str]
    options: dict[str, int]

    def build(self, capability: int) -> Build:
        kernel, signature, constants, divisible, options = self
        done = compile(kernel, signature, constants, capability, divisible=divisible, **options)
        return Build(kernel.__name__, done.registers, done.stack, done.shared)


@contextmanager
def _recorded() -> Iterator[list[_Launch]]:
    """Kernels are not launched but noted."""
    launches: list[_Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = {}, {}, set()
        for param in kernel.params:
            name, value = param.name, given.pop(param.name)
            specialized = isinstance(value, int) and not param.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
            elif param.is_constexpr or value is None or (specialized and value == 1):
                constants[name] = value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if specialized and value % 16 == 0:
                    divisible.add(name)
        launch = _Launch(kernel, signature, constants, divisible, given)
        if launch not in launches:
            launches.append(launch)

    run = JITFunction.run
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = run


def builds(
    kernel: str, numbers: Numbers, capability: int, workloads: Iterable[Workload]
) -> list[Build] | str:
    """Those of `kernel` for its different launches, or why it does not compile."""
    with using(kernel, numbers, capability), _recorded() as launches:
        for workload in workloads:
            workload.bind()()
    # Of the sampler's two kernels, each workload launches both.
    wanted = [launch for launch in launches if launch.kernel.__name__ == GRIDS[kernel].function]
    try:
        return [launch.build(capability) for launch in wanted]
    except Exception as e:  # of the many kinds that Triton's passes and ptxas have
        return f"does not compile: {(str(e).strip() or type(e).__name__).splitlines()[-1]}"


def flaw(found: list[Build] | str, capability: int) -> str:
    """Why such a configuration cannot be used; empty where it can."""
    if isinstance(found, str):
        return found
    stack, shared = max(build.stack for build in found), max(build.shared for build in found)
    if stack:
        return f"spills: {stack} bytes of stack"
    if shared > max_shared(capability):
        return f"{shared} bytes of shared memory, of {max_shared(capability)}"
    return ""
