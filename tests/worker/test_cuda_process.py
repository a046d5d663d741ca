"""A worker process whose results come from another thread than its plans go to."""

import asyncio
from pathlib import Path

import pytest

from asyncengine.engine.supervisor import WorkerGroup

HANDLER = "late_handler:LateHandler"


@pytest.fixture(autouse=True)
def workers_find_the_handler(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


async def run(plans, expected):
    results, deaths, news = [], [], asyncio.Event()

    def on_result(data):
        results.append(bytes(data))
        if len(results) == expected:
            news.set()

    def on_death(error):
        deaths.append(error)
        news.set()

    group = await WorkerGroup.start(1, on_result=on_result, on_death=on_death, handler=HANDLER)
    try:
        await group.run_stage("begin", b"", lambda *_: None)
        for plan in plans:
            assert group.send_plan(plan)
        await asyncio.wait_for(news.wait(), 30)
    finally:
        await group.stop()
    return results, deaths


def test_results_come_in_order_after_later_plans_were_read():
    plans = [b"%d" % i for i in range(9)]
    results, deaths = asyncio.run(run(plans, 9))
    assert results == [b"done " + plan for plan in plans] and not deaths


def test_an_error_on_the_results_thread_ends_the_rank_with_its_reason():
    results, deaths = asyncio.run(run([b"1", b"2", b"defect"], 9))
    assert results == [b"done 1", b"done 2"]
    assert len(deaths) == 1 and "no such block" in str(deaths[0])
