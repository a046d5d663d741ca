"""What Triton does with a launch before it compiles; interpreter and ahead-of-time compiles leave it out."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from asyncengine import kernels


def launched() -> Iterator[Any]:
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        for name, kernel in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and kernel.fn.__module__ == module.name:
                yield pytest.param(kernel, id=name)


@pytest.mark.parametrize("kernel", list(launched()))
def test_arguments_are_bound(kernel: Any) -> None:
    """In generated code, whose own variables hide arguments of the same names."""
    jit = JITFunction(kernel.fn)
    bind = create_function_from_signature(jit.signature, jit.params, make_backend(GPUTarget("cuda", 90, 32)))
    numbers = {name: 10 + index for index, name in enumerate(jit.arg_names)}
    bound, specialized, _ = bind(*numbers.values())
    assert bound == numbers
    expected = ["constexpr" if parameter.is_constexpr else "i32" for parameter in jit.params]
    assert [type_ for type_, _ in specialized] == expected
