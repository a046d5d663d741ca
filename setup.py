"""Builds the Cython extensions of `_fast/`; everything else is declared in pyproject.toml.

No flag here depends on the machine that builds: instruction sets beyond the baseline are chosen
inside the C sources with target pragmas and picked at run time.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class ParallelBuild(build_ext):
    """Compiles the sources of an extension side by side, where setuptools takes one after the other."""

    def build_extensions(self) -> None:
        compile_files = self.compiler.compile

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                return list(chain(*pool.map(lambda source: compile_files([source], **options), sources)))

        self.compiler.compile = compile_each
        super().build_extensions()


def extension(name: str) -> Extension:
    """`_fast/NAME.pyx` with the C sources, headers and parts in the folder beside it."""
    return Extension(
        f"asyncengine._fast.{name}",
        [f"_fast/{name}.pyx", *sorted(glob(f"_fast/{name}/*.c"))],
        include_dirs=["_fast"],
        # Also what a source distribution must hold besides the sources.
        depends=[f"_fast/{name}.pyx", *glob(f"_fast/{name}/*.h"), *glob(f"_fast/{name}/*.pxi")],
        extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-Wall"],
    )


PACKAGES = [
    "asyncengine",
    "asyncengine._fast",
    "asyncengine.checkpoint",
    "asyncengine.engine",
    "asyncengine.kernels",
    "asyncengine.scheduling",
    "asyncengine.serve",
    "asyncengine.text",
    "asyncengine.wire",
    "asyncengine.worker",
    "asyncengine.worker.cuda",
    "asyncengine.worker.models",
    "asyncengine.worker.ops",
]

setup(
    cmdclass={"build_ext": ParallelBuild},
    packages=PACKAGES,
    package_dir={"asyncengine._fast": "_fast", "asyncengine.kernels": "kernels"},
    package_data={"asyncengine": ["py.typed"], "asyncengine._fast": ["*.pyi"]},
    ext_modules=cythonize(
        [extension("ring"), extension("slots"), extension("cpu")],
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    ),
)
