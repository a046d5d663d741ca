"""The tests that need a GPU, as rows: 1 passed, 0 failed."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

__all__ = ["outcomes", "run"]

FOLDER = Path(__file__).parents[2] / "tests" / "gpu"


def run(report: Any, measured: dict[str, float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "--maxfail=20"]
        done = subprocess.run(
            [*command, f"--junitxml={path}"], cwd=FOLDER.parents[1], capture_output=True, text=True
        )
        found = outcomes(path) if path.exists() else {}
    passed = sum(outcome == "passed" for outcome in found.values())
    skipped = sum(outcome == "skipped" for outcome in found.values())
    failed = len(found) - passed - skipped
    report.add("tests that passed", passed, "tests", ratio=float(failed), goal="<= 0")
    report.add("tests that were skipped", skipped, "tests")
    for name, outcome in found.items():
        if outcome not in ("passed", "skipped"):
            report.add(f"{name}: {outcome}", 0, "tests")
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-1000:])


def outcomes(path: Path) -> dict[str, str]:
    """By test: passed, skipped, or the first line of what went wrong."""
    found = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag == "skipped":
                outcome = "skipped"
            elif child.tag in ("failure", "error"):
                outcome = (child.get("message") or child.tag).splitlines()[0][:160]
        found[case.get("name", "?")] = outcome
    return found
