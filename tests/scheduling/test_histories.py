"""Random histories of requests, steps, results and aborts; see `simulation`."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .simulation import Simulation


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.binary(max_size=500),
    block_size=st.sampled_from([1, 2, 4, 16]),
    num_blocks=st.integers(2, 40),
    max_num_seqs=st.integers(1, 8),
    budget=st.integers(1, 40),
    depth=st.integers(1, 4),
    caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    failures=st.booleans(),
    lookup=st.one_of(st.none(), st.sampled_from([(1, 1, 1), (3, 3, 2), (8, 4, 1), (64, 2, 2)])),
    waits=st.booleans(),
)
def test_random_histories(data, **config):
    simulation = Simulation(**config)
    simulation.run(data)
    simulation.drain()


SOAKS = [
    dict(block_size=1, num_blocks=60, max_num_seqs=6, budget=16, depth=3),
    dict(block_size=2, num_blocks=30, max_num_seqs=8, budget=24, depth=2, policy="priority"),
    dict(block_size=4, num_blocks=14, max_num_seqs=4, budget=7, depth=4, failures=True),
    dict(block_size=4, num_blocks=200, max_num_seqs=8, budget=64, depth=2),
    dict(block_size=4, num_blocks=16, max_num_seqs=8, budget=64, depth=2, caching=False),
    dict(block_size=16, num_blocks=5, max_num_seqs=5, budget=20, depth=1, policy="priority"),
    dict(block_size=1, num_blocks=62, max_num_seqs=6, budget=16, depth=3, lookup=(8, 3, 1), failures=True),
    dict(block_size=2, num_blocks=31, max_num_seqs=8, budget=64, depth=2, lookup=(4, 2, 1), waits=False),
    dict(
        block_size=4, num_blocks=15, max_num_seqs=8, budget=64, depth=4, lookup=(8, 4, 2), policy="priority"
    ),
]


@pytest.mark.parametrize("config", SOAKS, ids=lambda c: f"num_blocks={c['num_blocks']}")
def test_long_histories(config):
    """Together with the random ones above and the pool's: well over 10^5 operations."""
    simulation = Simulation(**config)
    generator = random.Random(config["num_blocks"])
    while simulation.operations < 14_000:
        simulation.run(generator.randbytes(4_000))
        simulation.drain()
    assert simulation.ended > 500
    if "lookup" in config:
        s = simulation.scheduler
        assert 300 < s.num_accepted_tokens < s.num_draft_tokens - 300
    if config["num_blocks"] < 40:
        assert simulation.scheduler.num_preemptions > 20
    if config.get("caching", True):
        assert simulation.scheduler.prefix_hit_tokens > 100
