"""Plans applied on the device against the host's own `Batch.prepare`, over several steps."""

import numpy as np
import pytest
import torch

from asyncengine.kernels.batch_update import DeviceBatch, batch_update
from asyncengine.kernels.slot_params import RECORD_WORDS, pack_record
from asyncengine.wire.plan import PLAN_HEADER, RELAY, SAMPLE
from asyncengine.worker.batch import Batch

SLOTS, TOKENS, LENGTH, BLOCK, BLOCKS = 6, 700, 640, 16, 64


def device_batch() -> DeviceBatch:
    """Whose inputs of a step hold -5 where nothing has been written."""
    batch = DeviceBatch.zeros(SLOTS, LENGTH // BLOCK, TOKENS, torch.device("cpu"))
    for name in set(batch._fields) - {"block_table", "last_token", "slot_params"}:
        getattr(batch, name).fill_(-5)
    return batch


def words_of(
    rows: list[tuple[int, int, int, int]],
    updates: list[tuple[int, int, int]],
    copies: list[tuple[int, int]],
    tokens: list[int],
) -> np.ndarray:
    header = [3, 17, len(rows), len(tokens), len(updates), len(copies), 0, 0]
    assert len(header) == PLAN_HEADER
    parts = [header, *rows, *updates, *copies, tokens]
    return np.array([word for part in parts for word in part], np.int32)


def check(device: DeviceBatch, host: Batch, words: np.ndarray, rows: int, records: bytes = b"") -> None:
    host.prepare(words.tobytes())
    staged = np.concatenate((words, np.frombuffer(records, np.int32)))
    staged[7] = len(records) // (4 * (RECORD_WORDS + 1))
    persistent = ("block_table", "last_token", "slot_params")
    for name, tensor in device._asdict().items():
        if name not in persistent:
            tensor.fill_(-5)
    batch_update(device, torch.from_numpy(staged), rows)
    real, tokens, samples = host.inputs.num_rows, host.inputs.num_tokens, host.inputs.num_samples
    got = {name: tensor.numpy() for name, tensor in device._asdict().items()}
    for name, count in (("token_ids", tokens), ("positions", tokens), ("token_row", tokens)):
        np.testing.assert_array_equal(got[name][:count], np.maximum(getattr(host, name)[:count], 0), name)
    for name, count in (("query_start", real + 1), ("context_len", real), ("row_slot", real)):
        np.testing.assert_array_equal(got[name][:count], getattr(host, name)[:count], name)
    np.testing.assert_array_equal(got["block_table"], host.block_table)
    np.testing.assert_array_equal(got["sample_rows"][:samples], host.sample_rows[:samples])
    np.testing.assert_array_equal(got["sample_slots"][:samples], host.sample_slots)
    np.testing.assert_array_equal(got["sample_positions"][:samples], host.sample_positions)
    # Padding: rows of one token without context, and no samples.
    padding = rows - real
    assert got["context_len"][real:rows].tolist() == [0] * padding
    assert got["query_start"][real : rows + 1].tolist() == list(range(tokens, tokens + padding + 1))
    assert got["token_row"][tokens : tokens + padding].tolist() == list(range(real, rows))
    assert got["positions"][tokens : tokens + padding].tolist() == [0] * padding
    assert (got["sample_slots"][samples:rows] == -1).all()
    assert (got["sample_rows"][samples:rows] == 0).all()
    for name, end in (("token_ids", tokens + padding), ("query_start", rows + 1), ("sample_rows", rows)):
        assert (got[name][end:] == -5).all()


@pytest.fixture
def host() -> Batch:
    return Batch(SLOTS, TOKENS, LENGTH, SLOTS, BLOCK, BLOCKS)


def test_a_sequence_of_plans(host: Batch) -> None:
    device = device_batch()
    prompt = list(range(1000, 1000 + 620))
    updates = [(4, i, (7 * i + 3) % BLOCKS) for i in range(39)]
    records = np.int32(4).tobytes() + pack_record(seed=2**64 - 1, temperature=0.5, top_k=7)
    check(device, host, words_of([(4, 0, 600, 0)], updates, [], prompt[:600]), 1, records)
    assert device.slot_params[4].numpy().tobytes() == pack_record(seed=2**64 - 1, temperature=0.5, top_k=7)
    assert not device.slot_params[:4].any() and not device.slot_params[5:].any()
    # The prompt's rest beside another whole prompt; block copies are passed over.
    plan = words_of(
        [(4, 600, 20, SAMPLE), (1, 0, 3, SAMPLE)], [(1, 0, 9)], [(1, 2), (3, 4)], [*prompt[600:], 5, 6, 7]
    )
    check(device, host, plan, 2)
    for last in (device.last_token.numpy(), host.last_token):
        last[[4, 1]] = (77, 78)
    # Relayed rows, a chunk that is not sampled from, one that is.
    rows = [(1, 3, 1, SAMPLE | RELAY), (4, 620, 1, SAMPLE | RELAY), (0, 0, 8, 0), (2, 5, 2, SAMPLE)]
    check(device, host, words_of(rows, [(0, 0, 1), (2, 0, 2)], [], list(range(10))), 4)
    # Decode alone, padded; one row's last draw failed.
    for last in (device.last_token.numpy(), host.last_token):
        last[[4, 1, 2]] = (80, -1, 82)
    rows = [(s, p, 1, SAMPLE | RELAY) for s, p in ((2, 7), (1, 4), (4, 621))]
    check(device, host, words_of(rows, [], [], []), 4)
    check(device, host, words_of(rows, [], [], []), SLOTS)


def test_no_rows_at_all(host: Batch) -> None:
    check(device_batch(), host, words_of([], [(3, 2, 1)], [], []), 2)


def test_many_updates(host: Batch) -> None:
    """More than one program takes at a time."""
    updates = [(s, i, (s + i) % BLOCKS) for s in range(SLOTS) for i in range(40)]
    rows = [(s, 0, 2, 0) for s in range(3)]
    records = b"".join(np.int32(s).tobytes() + pack_record(seed=s) for s in range(SLOTS))
    device = device_batch()
    check(device, host, words_of(rows, updates, [], list(range(6))), 3, records)
    assert device.slot_params[:, 0].tolist() == list(range(SLOTS))
