"""The tests that need a GPU: how many passed, and those that failed, each as soon as it has."""

import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

__all__ = ["run"]

FOLDER = Path(__file__).parents[2] / "tests" / "gpu"


class _Outcomes:
    """A plugin of pytest."""

    def __init__(self, report: Any) -> None:
        self._report = report
        self.count: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.count[report.outcome] += 1
        if report.failed:
            reason = str(report.longrepr).strip().splitlines()[-1][:160]
            self._report.add(f"{report.nodeid.partition('::')[2]}: {reason}", 0, "tests")


def run(report: Any, measured: dict[str, float]) -> None:
    outcomes = _Outcomes(report)
    files = sorted(FOLDER.glob("test_*.py"), reverse=True)  # kernels before engines, which take longer
    with redirect_stdout(sys.stderr):  # what a failure of this part shows
        code = pytest.main([*map(str, files), "-v", "--maxfail=20"], plugins=[outcomes])
    count = outcomes.count
    report.add("tests that passed", count["passed"], "tests", ratio=float(count["failed"]), goal="<= 0")
    report.add("tests that were skipped", count["skipped"], "tests")
    sys.exit(int(code))
