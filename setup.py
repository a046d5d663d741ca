"""Builds the Cython extensions of `_fast/`; everything else is declared in pyproject.toml.

No flag here depends on the machine that builds: instruction sets beyond the baseline are chosen
inside the C sources with target pragmas and picked at run time.
"""

from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup


def extension(name: str, *sources: str) -> Extension:
    return Extension(
        f"asyncengine._fast.{name}",
        [f"_fast/{name}.pyx", *sources],
        include_dirs=["_fast"],
        depends=glob(f"_fast/{name}/*.h") + glob("_fast/*.pxi"),
        extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-Wall"],
    )


EXTENSIONS = [
    extension("ring"),
    extension("slots"),
    extension("cpu", *sorted(glob("_fast/cpu/*.c"))),
]

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
    "asyncengine.worker.models",
    "asyncengine.worker.ops",
]

setup(
    packages=PACKAGES,
    package_dir={"asyncengine._fast": "_fast", "asyncengine.kernels": "kernels"},
    package_data={"asyncengine": ["py.typed"], "asyncengine._fast": ["*.pyi"]},
    ext_modules=cythonize(
        EXTENSIONS,
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
