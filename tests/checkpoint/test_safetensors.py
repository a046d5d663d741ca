"""Safetensors against the safetensors package, and against damage of every kind."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from asyncengine.checkpoint.safetensors import open_safetensors
from asyncengine.errors import ModelLoadError

TENSORS = {
    "model.embed_tokens.weight": np.arange(24, dtype=np.float32).reshape(6, 4),
    "model.norm.weight": np.ones(4, np.float16),
    "scale": np.array(2.5, np.float64),
    "empty": np.zeros((0, 3), np.float32),
}


def raw_file(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path, *words: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        open_safetensors(path)
    for word in words:
        assert word in str(caught.value)


def test_same_tensors_as_the_safetensors_package(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_safetensors(tmp_path)
    reference = load_file(tmp_path / "model.safetensors")
    assert set(checkpoint.names()) == set(reference)
    for name, array in reference.items():
        view = checkpoint.tensor(name)
        assert view.name == name and view.shape == array.shape
        assert view.dtype == {"float32": "F32", "float16": "F16", "float64": "F64"}[str(array.dtype)]
        assert view.data.readonly and bytes(view.data) == array.tobytes()
    assert checkpoint.total_bytes == sum(array.nbytes for array in reference.values())


def test_bfloat16_bytes_are_torchs(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    weight = torch.randn(5, 7).to(torch.bfloat16)
    save_torch({"w": weight}, tmp_path / "model.safetensors")
    view = open_safetensors(tmp_path).tensor("w")
    assert (view.dtype, view.shape) == ("BF16", (5, 7))
    assert bytes(view.data) == weight.view(torch.int16).numpy().tobytes()


def test_views_outlive_the_checkpoint(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = open_safetensors(tmp_path)
    view = checkpoint.tensor("model.norm.weight")
    checkpoint.close()
    checkpoint.close()
    assert bytes(view.data) == TENSORS["model.norm.weight"].tobytes()
    assert not checkpoint.names()


def sharded(directory):
    names = list(TENSORS)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, directory / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_with_an_index(tmp_path):
    sharded(tmp_path)
    checkpoint = open_safetensors(tmp_path)
    assert set(checkpoint.names()) == set(TENSORS)
    for name, array in TENSORS.items():
        assert bytes(checkpoint.tensor(name).data) == array.tobytes()
    assert checkpoint.file_of("scale").endswith("model-00002-of-00002.safetensors")


def test_several_files_without_an_index(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    assert set(open_safetensors(tmp_path).names()) == set(TENSORS)


def test_missing_shard(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors is missing", "download")


def test_index_and_shards_of_different_downloads(tmp_path):
    index = sharded(tmp_path)
    index["weight_map"]["other"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "model-00001-of-00002.safetensors", "lacks tensor 'other'")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", ""])
def test_index_cannot_leave_its_directory(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    refused(tmp_path, "model.safetensors.index.json", "not a *.safetensors file beside it")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 9999]
)
def test_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json", "download it again")


def test_same_tensor_in_two_files(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": np.ones(2, np.float32)}, tmp_path / name)
    refused(tmp_path, "a.safetensors", "b.safetensors", "'w'")


def test_no_weights_at_all(tmp_path):
    refused(tmp_path, "no *.safetensors")
    refused(tmp_path / "nowhere", "nowhere")


def test_unsupported_types_are_listed_but_not_read(tmp_path):
    header = {
        "a": entry("I64", [2], 0, 16),
        "b": entry("F8_E4M3", [3], 16, 19),
        "c": entry("F9", [9], 19, 20),
    }
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, bytes(20)))
    checkpoint = open_safetensors(tmp_path)
    assert set(checkpoint.names()) == {"a", "b", "c"}
    for name, dtype in (("a", "I64"), ("b", "F8_E4M3"), ("c", "F9")):
        with pytest.raises(
            ModelLoadError, match=rf"'{name}' of type {dtype}.*supported: BF16, F16, F32, F64"
        ):
            checkpoint.tensor(name)
    with pytest.raises(ModelLoadError, match="holds no tensor 'd'"):
        checkpoint.tensor("d")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"short", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (raw_file(b"{}", length=2**64 - 1), "cut short"),
        (raw_file(b"{}", length=3), "cut short"),
        (raw_file(b"[]"), "damaged header"),
        (raw_file(b"{" * 50000), "damaged header"),
        (raw_file(b'{"a": ' + b"[" * 50000), "damaged header"),
        (raw_file({"a": entry("F32", [2], 0, 4)}, bytes(4)), "cannot have 4 bytes"),
        (raw_file({"a": entry("F32", [2**62, 4], 0, 0)}), "cannot have 0 bytes"),
        (raw_file({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "damaged header"),
        (raw_file({"a": entry("F32", [1] * 17, 0, 4)}, bytes(4)), "damaged header"),
        (raw_file({"a": entry("F32", [2**64], 0, 4)}, bytes(4)), "damaged header"),
        (raw_file({"a": entry("F32", [2], 8, 0)}, bytes(8)), "damaged"),
        (raw_file({"a": entry("F32", [2], 0, 8)}, bytes(7)), "cut short"),
        (raw_file({"a": entry("F32", [2], 0, 8)}, bytes(9)), "1 bytes after"),
        (raw_file({"a": entry("F32", [1], 4, 8)}, bytes(8)), "gap"),
        (raw_file({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, bytes(8)), "overlap"),
        (raw_file({"a": entry("F32", [True], 0, 4)}, bytes(4)), "damaged header"),
        (raw_file({"a": {"dtype": "F32"}}), "damaged header"),
        (raw_file(b'{"\xff": 1}'), "damaged header"),
    ],
)
def test_damaged_files(tmp_path, data, word):
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path, "model.safetensors", word)


def test_header_of_more_than_100_mb(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    refused(tmp_path, "header of 100000001 bytes")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_only_ever_refused(tmp_path, data):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        checkpoint = open_safetensors(tmp_path)
        for name in checkpoint.names():
            assert checkpoint.tensor(name).data.nbytes <= len(content)
    except ModelLoadError as error:
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
