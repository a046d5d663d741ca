"""Runs tests at level `amx` on machines with AVX-512 that lack its instructions:

    python tests/cpu/amx_model.py [pytest's arguments; all of tests/cpu without]

Builds the native backend once more, where `amx_model.h` stands for the instructions, and gives it to the
tests in place of the installed one, with no other level beside `portable`. It takes minutes.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import pytest
from Cython.Build import cythonize
from setuptools import Distribution, Extension

HERE = Path(__file__).resolve().parent
FAST = HERE.parent.parent / "_fast"
NAME = "asyncengine._fast.cpu"


def build(folder: Path) -> Path:
    """The extension in `folder`; `setup.py` builds what is shipped."""
    extension = Extension(
        NAME,
        [str(FAST / "cpu.pyx"), *sorted(map(str, FAST.glob("cpu/*.c")))],
        include_dirs=[str(FAST), str(FAST / "cpu"), str(HERE)],
        define_macros=[("AE_AMX_MODEL", None)],
        extra_compile_args=["-O2", "-std=gnu11", "-fno-math-errno", "-Wall"],
    )
    directives = {"boundscheck": False, "wraparound": False, "cdivision": True, "initializedcheck": False}
    modules = cythonize([extension], build_dir=str(folder / "cython"), compiler_directives=directives)
    command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder), str(folder / "objects")
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(NAME))


def load(path: Path) -> None:
    """`from asyncengine._fast import cpu` gives the extension at `path` from now on."""
    import asyncengine._fast

    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    asyncengine._fast.cpu = module
    if "amx" not in module.levels():
        sys.exit("needs a processor with AVX-512 and its 8-bit dot product")
    module.levels = lambda: ["portable", "amx"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        load(build(Path(folder)))
        sys.exit(pytest.main(sys.argv[1:] or [str(HERE)]))
