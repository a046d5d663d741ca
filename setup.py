"""Builds the Cython extensions of `_fast/`; everything else is declared in pyproject.toml.

No flag here depends on the machine that builds: instruction sets beyond the baseline are chosen
inside the C sources with target pragmas and picked at run time.
"""

from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup


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
