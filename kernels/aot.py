"""Kernels compiled ahead of time for GPUs that need not be there, and what became of them."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["Compiled", "compile"]

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Compiled(NamedTuple):
    cubin: bytes
    ptx: str
    ttgir: str
    shared: int
    """Bytes per program."""
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread; above 0 where registers did not suffice."""
    sass: Counter[str]
    """How often each machine instruction occurs, without its modifiers: HGMMA, LDG, ..."""


def compile(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    capability: int,
    *,
    divisible: Collection[str] = (),
    **options: int,
) -> Compiled:
    """Compiles a `triton.jit` function for compute capability `capability`, as 90 for 9.0.

    `signature` has Triton's types by argument, as "*bf16" and "i32", `constexprs` the other arguments.
    Pointers and the integers in `divisible` are taken to be multiples of 16, which lets the compiler load
    vectors. `options` are those of a launch: num_warps, num_stages, maxnreg.
    """
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type_) in enumerate(types.items())
        if type_.startswith("*") or name in divisible
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constexprs), attrs=multiples)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    asm = built.asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"\b(REG|STACK):(\d+)", _dump("-res-usage", file.name)))
        sass = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", _dump("-sass", file.name), re.M)
    return Compiled(
        asm["cubin"],
        asm["ptx"],
        asm["ttgir"],
        built.metadata.shared,
        int(usage["REG"]),
        int(usage["STACK"]),
        Counter(sass),
    )


def _dump(what: str, path: str) -> str:
    command = [str(_CUOBJDUMP), what, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
