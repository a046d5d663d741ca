"""The house rules that a machine can check: floors, towers, a torch-free host, lint, types."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asyncengine"

# Floors from the ground up. A module may import its own floor and those below it; the two towers
# stand side by side and meet only on the ground.
GROUND = [
    "errors",
    "params",
    "outputs",
    "metrics",
    "checkpoint",
    "cores",
    "gpus",
    "speculation",
    "args",
    "config",
    "wire",
]
HOST = ["text", "scheduling", "engine", "llm", "sync", "serve", "__main__"]
WORKER = ["worker"]
NATIVE = ["_fast"]
TORCH = {"torch", "triton"}
HEAVY = {*TORCH, "transformers"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The top-level part of the package a file belongs to: `engine` for engine/core.py."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, anywhere in it, with the line."""
    package = ["asyncengine", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name, node.lineno
            yield from ((f"{name}.{alias.name}", node.lineno) for alias in node.names)


def allowed(part: str) -> set[str]:
    if part in GROUND:
        return {*GROUND[: GROUND.index(part) + 1], *NATIVE}
    if part in HOST:
        return {*GROUND, *HOST[: HOST.index(part) + 1], *NATIVE}
    if part in WORKER:
        return {*GROUND, *WORKER, *NATIVE, "kernels"}
    return {*GROUND, *HOST}  # asyncengine/__init__.py


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    mine = part_of(path)
    assert mine in {*GROUND, *HOST, *WORKER, "__init__"}, f"{mine} has no floor: give it one in this test"
    for name, line in imports(path):
        pieces = name.split(".")
        if pieces[0] == "asyncengine" and len(pieces) > 1:
            assert pieces[1] in allowed(mine), f"{path}:{line}: {mine} may not import {pieces[1]}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_cuda_worker_imports_torch_and_kernels(path: Path) -> None:
    is_cuda = path.is_relative_to(PACKAGE / "worker" / "cuda")
    for name, line in imports(path):
        if not (is_cuda and name.split(".")[0] in TORCH):
            assert name.split(".")[0] not in HEAVY, f"{path}:{line} imports {name}"
        if not is_cuda:
            assert name.split(".")[:2] != ["asyncengine", "kernels"], f"{path}:{line} imports {name}"


def test_no_import_circles() -> None:
    files = {".".join(("asyncengine", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in modules()}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {
        name: {target for target, _ in imports(path) if target in files and target != name}
        for name, path in files.items()
        if name != "asyncengine"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph.get(name, ()):
                # A package's __init__ is empty here; importing from it is importing its modules.
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_native_modules_import_nothing_of_ours() -> None:
    sources = [p for p in (ROOT / "_fast").rglob("*") if p.suffix in (".pyx", ".pxi", ".pyi")]
    assert len(sources) > 10
    for path in sources:
        for line in path.read_text().splitlines():
            if line.lstrip().startswith(("import", "from", "cimport")):
                assert "asyncengine" not in line, f"{path}: {line}"


def test_import_has_no_side_effect_and_host_is_torch_free() -> None:
    code = """
import sys, os, threading, signal, asyncio, logging

def state():
    handlers = [signal.getsignal(s) for s in signal.valid_signals()]
    return dict(os.environ), handlers, type(asyncio.get_event_loop_policy())

before = state()
import asyncengine
assert set(sys.modules) & {"torch", "transformers", "numpy", "uvloop", "tokenizers", "jinja2"} == set()
asyncengine.AsyncLLM, asyncengine.LLM, asyncengine.SamplingParams, asyncengine.GenerationStream
import asyncengine.serve.cli
assert set(sys.modules) & {"torch", "transformers", "triton"} == set(), "heavy import"
assert before == state()
assert threading.active_count() == 1
assert not logging.getLogger().handlers
"""
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True)


def test_every_public_name_resolves() -> None:
    import asyncengine

    for name in asyncengine.__all__:
        assert getattr(asyncengine, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = asyncengine.nonsense


@pytest.mark.parametrize("command", [["check", "."], ["format", "--check", "."]], ids=" ".join)
def test_lint(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types(tmp_path: Path) -> None:
    """Strictly, on the package laid out as it is installed: `_fast` and `kernels` inside."""
    (tmp_path / "asyncengine").mkdir()
    for path in [*PACKAGE.iterdir(), ROOT / "_fast", ROOT / "kernels"]:
        (tmp_path / "asyncengine" / path.name).symlink_to(path)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "-p",
        "asyncengine",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
