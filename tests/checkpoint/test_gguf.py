"""GGUF against the gguf package, and against damage of every kind."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncengine.checkpoint.gguf import GGUFFile
from asyncengine.errors import ModelLoadError

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 32


def write_gguf(path, tensors, *, arch="llama", quantized=None, **metadata) -> Path:
    writer = GGUFWriter(path, arch)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "ö", "", "<|end|>"])
    writer.add_token_types([1, 2, 3, 4])
    writer.add_array("test.floats", [0.5, -1.5])
    writer.add_bool("test.flag", True)
    writer.add_int64("test.large", -(2**62))
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, array in tensors.items():
        kind = (quantized or {}).get(name)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def small(path, **options) -> Path:
    rng = np.random.default_rng(1)
    tensors = {
        "token_embd.weight": rng.standard_normal((4, HIDDEN)).astype(np.float32),
        "blk.0.attn_q.weight": rng.standard_normal((HEADS * HEAD_DIM, HIDDEN)).astype(np.float32),
        "blk.0.attn_k.bias": rng.standard_normal(KV_HEADS * HEAD_DIM).astype(np.float32),
        "output_norm.weight": np.ones(HIDDEN, np.float32),
    }
    return write_gguf(path, tensors, **options)


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """The permutation of llama.cpp's converter."""
    shaped = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(shaped.swapaxes(1, 2)).reshape(array.shape)


def refused(path, *words: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        GGUFFile(path)
    for word in words:
        assert word in str(caught.value)


def test_demo_model_equals_the_gguf_package(demo_gguf):
    ours, theirs = GGUFFile(demo_gguf), GGUFReader(demo_gguf)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == expected
    assert ours.architecture == "llama"
    # GGUF names by Hugging Face names, from the package's own table of the architecture.
    from gguf import MODEL_ARCH, get_tensor_name_map

    name_map = get_tensor_name_map(MODEL_ARCH.LLAMA, 30)
    tensors = {tensor.name: tensor for tensor in theirs.tensors}
    assert len(ours.names()) == len(tensors)
    for name in ours.names():
        stem, suffix = name.rsplit(".", 1)
        tensor = tensors.pop(f"{name_map.get_name(stem)}.{suffix}")
        view = ours.tensor(name)
        assert view.dtype == tensor.tensor_type.name
        assert view.shape == tuple(tensor.shape.tolist()[::-1])
        assert view.data.readonly
        rows = np.asarray(tensor.data).view(np.uint8).reshape(view.shape[0], -1)
        heads = {"q_proj": 9, "k_proj": 3}.get(stem.rsplit(".", 1)[-1])
        got = np.frombuffer(view.data, np.uint8).reshape(rows.shape)
        assert np.array_equal(interleave(got, heads) if heads else got, rows)
    assert not tensors
    ours.close()


def test_without_arrays_only_the_vocabulary_is_missing(demo_gguf):
    whole, light = GGUFFile(demo_gguf), GGUFFile(demo_gguf, arrays=False)
    vocabulary = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"}
    assert whole.metadata.keys() - light.metadata.keys() == vocabulary
    assert all(whole.metadata[key] == value for key, value in light.metadata.items())
    assert list(light.names()) == list(whole.names())


def test_metadata_types(tmp_path):
    path = small(tmp_path / "m.gguf")
    metadata = GGUFFile(path).metadata
    assert metadata["tokenizer.ggml.tokens"] == ["a", "ö", "", "<|end|>"]
    assert metadata["tokenizer.ggml.token_type"] == [1, 2, 3, 4]
    assert metadata["test.floats"] == [0.5, -1.5]
    assert metadata["test.flag"] is True
    assert metadata["test.large"] == -(2**62)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_query_and_key_rows_come_in_hugging_face_order(tmp_path, arch, kind):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    key_bias = rng.standard_normal(KV_HEADS * HEAD_DIM).astype(np.float32)
    stored = {"blk.3.attn_q.weight": query, "blk.3.attn_v.weight": query, "blk.3.attn_k.bias": key_bias}
    if arch == "llama":
        stored["blk.3.attn_q.weight"] = interleave(query, HEADS)
        stored["blk.3.attn_k.bias"] = interleave(key_bias, KV_HEADS)
    quantized = {name: GGMLQuantizationType[kind] for name in stored if name.endswith("weight")}
    path = write_gguf(tmp_path / "m.gguf", stored, arch=arch, quantized=quantized)
    gguf = GGUFFile(path)
    expected = quants.quantize(query, GGMLQuantizationType[kind]).tobytes()
    for name in ("q_proj", "v_proj"):
        view = gguf.tensor(f"model.layers.3.self_attn.{name}.weight")
        assert (view.dtype, view.shape) == (kind, query.shape)
        assert bytes(view.data) == expected
    assert bytes(gguf.tensor("model.layers.3.self_attn.k_proj.bias").data) == key_bias.tobytes()


def test_block_sizes_are_those_of_the_gguf_package():
    from gguf import GGML_QUANT_SIZES

    from asyncengine.checkpoint.gguf_header import _TYPES

    for code, (name, per_block, block_bytes) in _TYPES.items():
        kind = GGMLQuantizationType(code)
        assert (kind.name, *GGML_QUANT_SIZES[kind]) == (name, per_block, block_bytes)


def test_types_that_cannot_be_loaded_are_listed(tmp_path):
    array = np.zeros((2, 256), np.float32)
    path = write_gguf(
        tmp_path / "m.gguf",
        {"blk.0.ffn_up.weight": array, "blk.0.odd.weight": array},
        quantized={"blk.0.ffn_up.weight": GGMLQuantizationType.TQ2_0},
    )
    gguf = GGUFFile(path)
    assert list(gguf.names()) == ["model.layers.0.mlp.up_proj.weight", "blk.0.odd.weight"]
    assert gguf.info("model.layers.0.mlp.up_proj.weight").dtype == "TQ2_0"
    with pytest.raises(ModelLoadError, match=r"blk\.0\.ffn_up\.weight.*TQ2_0.*supported: .*Q6_K"):
        gguf.tensor("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ModelLoadError, match="holds no tensor 'nothing'"):
        gguf.tensor("nothing")


def test_rope_factors_are_not_a_tensor(tmp_path):
    factors = np.array([1, 1, 2.5, 8], np.float32)
    gguf = GGUFFile(write_gguf(tmp_path / "m.gguf", {"rope_freqs.weight": factors}))
    assert not gguf.names()
    assert gguf.rope_factors == (1.0, 1.0, 2.5, 8.0)
    bad = GGUFFile(write_gguf(tmp_path / "n.gguf", {"rope_freqs.weight": -factors}))
    with pytest.raises(ModelLoadError, match=r"rope_freqs\.weight"):
        _ = bad.rope_factors


def test_views_outlive_the_file(tmp_path):
    gguf = GGUFFile(small(tmp_path / "m.gguf"))
    view = gguf.tensor("model.norm.weight")
    gguf.close()
    gguf.close()
    assert bytes(view.data) == np.ones(HIDDEN, np.float32).tobytes()


def split(directory, count=3):
    paths = []
    for number in range(count):
        writer = GGUFWriter(directory / f"m-{number + 1:05d}-of-{count:05d}.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count)
        if number == 0:
            writer.add_string("general.name", "in parts")
        writer.add_tensor(f"blk.{number}.ffn_up.weight", np.full((2, 4), number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(directory / f"m-{number + 1:05d}-of-{count:05d}.gguf")
    return paths


@pytest.mark.parametrize("given_part", [0, 2])
def test_split_models(tmp_path, given_part):
    gguf = GGUFFile(split(tmp_path)[given_part])
    assert gguf.metadata["general.name"] == "in parts"
    for layer in range(3):
        view = gguf.tensor(f"model.layers.{layer}.mlp.up_proj.weight")
        assert bytes(view.data) == np.full(8, layer, np.float32).tobytes()


def test_split_models_that_are_not_whole(tmp_path):
    first, second, third = split(tmp_path)
    third.rename(tmp_path / "third")
    refused(first, "m-00003-of-00003.gguf is missing")
    third.write_bytes(second.read_bytes())
    refused(first, "m-00003-of-00003.gguf")
    first.rename(tmp_path / "model.gguf")
    refused(tmp_path / "model.gguf", "one of 3 files", "-00001-of-00003.gguf")


def header(version=3, tensors=0, pairs=0, rest=b"", magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, pairs) + rest


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, code: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", code) + value


def tensor(name=b"t", shape=(4,), code=0, offset=0) -> bytes:
    dims = b"".join(struct.pack("<Q", n) for n in shape)
    return string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", code, offset)


def padded(data: bytes, body: int) -> bytes:
    return data + bytes(-len(data) % 32) + bytes(body)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"GG", "not a GGUF file"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (header(version=1), "version 1"),
        (header(version=0x03000000), "big-endian"),
        (header()[:-1], "cut short"),
        (header(tensors=2**63), "cut short"),
        (header(pairs=2**64 - 1), "cut short"),
        (header(pairs=1, rest=pair(b"k", 99, bytes(8))), "unknown type 99"),
        (header(pairs=1, rest=struct.pack("<Q", 2**62) + bytes(50)), "cut short"),
        (header(pairs=1, rest=pair(b"\xff", 0, bytes(20))), "UTF-8"),
        (header(pairs=1, rest=pair(b"k", 8, string(b"\xff" * 9))), "UTF-8"),
        (header(pairs=1, rest=pair(b"k", 8, struct.pack("<Q", 2**63))), "cut short"),
        (header(pairs=2, rest=pair(b"k", 0, b"1") * 2 + bytes(9)), "twice"),
        (header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(30))), "items of type 9"),
        (header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 10, 2**61))), "cut short"),
        (header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 8, 2**61))), "cut short"),
        (header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 5))), "cut short"),
        (header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 8, 1) + string(b"\xff"))), "UTF-8"),
        (header(pairs=1, rest=pair(b"general.alignment", 4, struct.pack("<I", 33))), "general.alignment"),
        (header(pairs=1, rest=pair(b"general.alignment", 4, bytes(4))), "general.alignment"),
        (header(pairs=1, rest=pair(b"split.count", 8, string(b"2"))), "split.count"),
        (header(tensors=1, rest=tensor(shape=())), "0 dimensions"),
        (header(tensors=1, rest=tensor(shape=(1,) * 5)), "5 dimensions"),
        (header(tensors=1, rest=tensor(shape=(4, 0))), "empty"),
        (header(tensors=1, rest=tensor(code=77)), "unknown type 77"),
        (header(tensors=1, rest=tensor(code=2, shape=(33,))), "whole Q4_0 blocks"),
        (padded(header(tensors=1, rest=tensor(offset=8)), 32), "multiple of 32"),
        (padded(header(tensors=1, rest=tensor()), 15), "cut short"),
        (padded(header(tensors=1, rest=tensor(shape=(2**63, 2**63))), 32), "cut short"),
        (padded(header(tensors=1, rest=tensor(offset=2**63)), 32), "cut short"),
        (padded(header(tensors=2, rest=tensor(b"a") + tensor(b"b")), 32), "overlap"),
        (padded(header(tensors=2, rest=tensor() + tensor(offset=32)), 64), "twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_damaged_files(tmp_path, data, word):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    refused(path, "m.gguf", word)


def test_missing_file_and_directory(tmp_path):
    refused(tmp_path / "none.gguf", "none.gguf", "No such file")
    refused(tmp_path, str(tmp_path))


def test_metadata_beyond_the_bound(tmp_path):
    path = tmp_path / "m.gguf"
    with open(path, "wb") as file:
        file.write(header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 0, 130 << 20))))
        file.truncate(140 << 20)
    refused(path, "metadata of more than")
    with open(path, "r+b") as file:
        file.write(header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 0, 17 << 20))))
    refused(path, "items together")


@pytest.mark.parametrize("heads", [0, 3, 5, 2**31])
def test_head_count_that_does_not_fit_the_rows(tmp_path, heads):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_head_count(heads)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((16, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=r"blk\.0\.attn_q\.weight"):
        GGUFFile(tmp_path / "m.gguf").tensor("model.layers.0.self_attn.q_proj.weight")


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> bytes:
    return small(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_only_ever_refused(tmp_path, intact, data):
    content = bytearray(intact)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        gguf = GGUFFile(path)
        _ = gguf.rope_factors
        for name in gguf.names():
            assert gguf.tensor(name).data.nbytes <= len(content)
    except ModelLoadError as error:
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
