"""The block pool against a pool of plain lists and dicts."""

import random
from array import array

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncengine._fast.slots import BlockPool, siphash128

from . import model

KEY = bytes(range(16))


def test_siphash_known_answers():
    # The first vectors of the reference implementation's 128-bit table, key 00..0f, message 00..n-1.
    for size, digest in enumerate(
        ["a3817f04ba25a8e66df67214c7550293", "da87c1d86b99af44347659119b22fc45"],
    ):
        assert siphash128(KEY, bytes(range(size))).hex() == digest


@given(st.binary(min_size=16, max_size=16), st.binary(max_size=300))
def test_siphash_is_the_one_of_the_paper(key, data):
    assert siphash128(key, data) == model.siphash128(key, data)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), st.binary(max_size=20), st.integers(1, 7))
def test_chain_is_a_hash_of_parent_and_block(tokens, salt, block_size):
    chain = BlockPool(4, block_size, KEY).chain(array("i", tokens), salt)
    assert len(chain) == 16 * (1 + len(tokens) // block_size)
    padded = salt + b"\x01"
    while len(padded) % 4 != 1:
        padded += b"\0"
    parent = model.siphash128(KEY, padded)
    assert chain[:16] == parent
    for i in range(len(tokens) // block_size):
        block = array("i", tokens[i * block_size : (i + 1) * block_size]).tobytes()
        parent = model.siphash128(KEY, parent + block)
        assert chain[16 * (i + 1) : 16 * (i + 2)] == parent


def test_salts_and_keys_separate():
    tokens = array("i", range(8))
    pool, other = BlockPool(4, 4, KEY), BlockPool(4, 4, bytes(16))
    chains = {pool.chain(tokens), pool.chain(tokens, b"a"), pool.chain(tokens, b"a\0"), other.chain(tokens)}
    assert len(chains) == 4
    assert BlockPool(4, 4, KEY, False).chain(tokens) == b""


def test_wrong_use_is_refused():
    pool = BlockPool(2, 4, KEY)
    for wrong in (-1, 2, 2**30):
        with pytest.raises(ValueError, match="block"):
            pool.free(wrong)
        with pytest.raises(ValueError, match="block"):
            pool.refs(wrong)
    with pytest.raises(ValueError, match="block 0"):
        pool.free(0)
    with pytest.raises(ValueError, match="block 1"):
        pool.retain(1)
    for arguments in ((0, 4, KEY), (2, 0, KEY), (2, 4, b"short")):
        with pytest.raises(ValueError, match="needs"):
            BlockPool(*arguments)
    block = pool.allocate()
    with pytest.raises(ValueError, match="16 bytes"):
        pool.publish(block, b"short")
    pool.check()


def run(data: bytes, num_blocks: int, block_size: int) -> int:
    """Interprets bytes as operations on both pools; returns their number."""
    pool, plain = BlockPool(num_blocks, block_size, KEY), model.ModelPool(num_blocks, block_size)
    held: list[list[int]] = []
    numbers = iter(data)
    operations = 0
    for op in numbers:
        operations += 1
        a, b = next(numbers, 0), next(numbers, 0)
        if op % 8 < 3:  # a sequence takes what is cached and allocates the rest
            tokens = [a >> (i % 8) & 1 for i in range(1 + b % (3 * block_size + 1))]
            salt = b"s" if op & 64 else b""
            chain = pool.chain(array("i", tokens), salt)
            blocks = pool.match(chain, len(tokens))
            assert blocks == plain.match(tokens, salt)
            for block in blocks:
                pool.retain(block)
                plain.retain(block)
            prefixes = plain.prefixes(tokens, salt)
            while len(blocks) * block_size < len(tokens):
                block = pool.allocate()
                assert block == plain.allocate()
                if block < 0:
                    break
                blocks.append(block)
            if op & 128:
                for i, (block, prefix) in enumerate(zip(blocks, prefixes, strict=False)):
                    pool.publish(block, chain[16 * (i + 1) : 16 * (i + 2)])
                    plain.publish(block, prefix)
            held.append(blocks)
        elif op % 8 < 6 and held:  # a sequence leaves
            for block in reversed(held.pop(a % len(held))):
                pool.free(block)
                plain.release(block)
        elif op % 8 == 6 and held:  # a fork
            held.append(list(held[a % len(held)]))
            for block in held[-1]:
                pool.retain(block)
                plain.retain(block)
        elif op == 7:
            pool.reset()
            plain.reset()
        assert pool.num_free == len(plain.free)
        assert pool.num_cached == len(plain.index)
        assert [pool.refs(i) for i in range(num_blocks)] == plain.refs
        assert [pool.is_cached(i) for i in range(num_blocks)] == [
            i in plain.content for i in range(num_blocks)
        ]
        pool.check()
    for blocks in held:
        for block in reversed(blocks):
            pool.free(block)
            plain.release(block)
    pool.check()
    assert pool.num_free == num_blocks
    assert [pool.allocate() for _ in plain.free] == plain.free, "the order of reuse differs"
    assert pool.allocate() == -1
    assert pool.num_cached == 0
    return operations


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300), st.integers(1, 24), st.sampled_from([1, 2, 4, 16]))
def test_pool_follows_the_model(data, num_blocks, block_size):
    run(data, num_blocks, block_size)


@pytest.mark.parametrize("num_blocks", [3, 17, 64])
@pytest.mark.parametrize("block_size", [1, 4])
def test_pool_follows_the_model_for_long(num_blocks, block_size):
    data = random.Random(num_blocks * block_size).randbytes(15_000)
    assert run(data, num_blocks, block_size) == 5_000
