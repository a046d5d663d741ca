"""The tokenizer from GGUF metadata, against transformers' own conversion and tokenizers."""

import json
import os

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from tokenizers import Tokenizer as Core
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from asyncengine.errors import ModelLoadError
from asyncengine.text.gguf_tokenizer import load_gguf_tokenizer
from asyncengine.text.tokenizer import INLINE_CHARACTERS
from asyncengine.text.tokenizer_files import load_tokenizer

from .texts import any_text, train_byte_level, train_sentencepiece, varied


@pytest.fixture(scope="module")
def demo(demo_gguf):
    fields = GGUFReader(demo_gguf).fields
    return load_gguf_tokenizer({key: field.contents() for key, field in fields.items()})


@pytest.fixture(scope="module")
def demo_transformers(demo_gguf):
    return AutoTokenizer.from_pretrained(os.path.dirname(demo_gguf), gguf_file=os.path.basename(demo_gguf))


@pytest.fixture(scope="module")
def demo_oracle(demo_transformers):
    """As transformers builds it, but with the pre-tokenizer of SmolLM2's own tokenizer.json.

    transformers' GGUF conversion does not know `smollm` and falls back to GPT-2's split, which
    differs where digits follow more than one space or line break.
    """
    core = Core.from_str(demo_transformers.backend_tokenizer.to_str())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return core


def test_demo_ids_equal_the_oracle(demo, demo_oracle):
    texts = varied()
    assert len(texts) >= 200
    for text in texts:
        assert demo.encode(text) == demo_oracle.encode(text).ids
    whole = "".join(texts)
    assert len(whole) > INLINE_CHARACTERS
    assert demo.encode(whole) == demo_oracle.encode(whole).ids


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_demo_ids_of_any_text(demo, demo_oracle, text):
    ids = demo.encode(text)
    assert ids == demo_oracle.encode(text).ids
    for skip in (False, True):
        assert demo.decode(ids, skip_special_tokens=skip) == demo_oracle.decode(ids, skip_special_tokens=skip)


def test_demo_equals_transformers_as_it_is_without_digits(demo, demo_transformers):
    for text in varied():
        if not any(character.isnumeric() for character in text):
            ids = demo_transformers(text)["input_ids"]
            assert demo.encode(text) == ids
            for skip in (False, True):
                assert demo.decode(ids, skip_special_tokens=skip) == demo_transformers.decode(
                    ids, skip_special_tokens=skip
                )


def test_demo_facts(demo, demo_transformers, demo_gguf):
    assert (demo.bos_token, demo.eos_token) == (demo_transformers.bos_token, demo_transformers.eos_token)
    assert (demo.bos_token_id, demo.eos_token_id) == (1, 2)
    assert demo.vocab_size == len(demo_transformers)
    assert demo.special_ids == {i for i, t in demo_transformers.added_tokens_decoder.items() if t.special}
    assert demo.chat_template == demo_transformers.chat_template
    assert demo.token_text(demo.encode(" Hello")[0]) == " Hello"
    assert demo.token_text(2) == "<|im_end|>"
    assert demo.token_text(49152) is None and demo.token_text(-1) is None and demo.token_text(2**40) is None
    assert load_tokenizer(demo_gguf).encode("The same, read by asyncengine") == demo.encode(
        "The same, read by asyncengine"
    )


def byte_level_metadata(pre, **more):
    model = json.loads(train_byte_level().to_str())["model"]
    tokens = [*model["vocab"], "<|begin|>", "<|end|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(model["vocab"]) + [3, 3, 4],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        **more,
    }


def grouped(metadata):
    """The same in transformers' names."""
    names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    short = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    return {names.get(key, key): value for key, value in short.items()}


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "tekken", "deepseek-r1-qwen", "smaug-bpe"])
def test_byte_level_splits_equal_transformers(pre):
    metadata = byte_level_metadata(pre)
    ours = load_gguf_tokenizer(metadata)
    theirs, _ = convert_gguf_tokenizer("llama", grouped(metadata))
    texts = [text for text in varied() if "<|endoftext|>" not in text]  # transformers always adds this one
    for text in [*texts, "<|begin|>x <tool>y<|end|>"]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text).ids
    begins = pre in ("llama-bpe", "tekken")
    assert ours.encode("x")[: 1 + begins] == [ours.bos_token_id] * begins + ours.encode(
        "x", add_special_tokens=False
    )


def test_qwen2_equals_its_own_tokenizer_in_transformers():
    metadata = byte_level_metadata("qwen2")
    ours = load_gguf_tokenizer(metadata)
    model = json.loads(train_byte_level().to_str())["model"]
    theirs = Qwen2Tokenizer(vocab=dict(model["vocab"]), merges=[tuple(m) for m in model["merges"]])
    for text in varied():
        if "<|" not in text:
            assert ours.encode(text) == theirs(text)["input_ids"]


def test_whole_words_come_before_merges():
    metadata = byte_level_metadata("llama-bpe")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens.append("quixotry")  # in the vocabulary, but no merge makes it
    metadata["tokenizer.ggml.token_type"].append(1)
    assert load_gguf_tokenizer(metadata).encode("quixotry", add_special_tokens=False) == [len(tokens) - 1]
    metadata["tokenizer.ggml.pre"] = "smaug-bpe"
    assert len(load_gguf_tokenizer(metadata).encode("quixotry")) > 1


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_transformers(prefix):
    tokens, scores, types = train_sentencepiece()
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    ours = load_gguf_tokenizer(metadata)
    theirs, _ = convert_gguf_tokenizer("llama", grouped(metadata))
    if not prefix:
        theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    for text in [*varied(), "<s>a<turn>b</s>", "unseen 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ꙮ"]:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == [1, *ids]
        if prefix:
            assert ours.decode(ids) == theirs.decode(ids)
    assert ours.special_ids == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "mystery"}, "'mystery'.*tokenizer="),
        ({"tokenizer.ggml.model": "rwkv"}, "'rwkv'.*tokenizer="),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model.*skip_tokenizer_init"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "not all strings"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab'"),
        ({"tokenizer.ggml.merges": ["no such"]}, "do not fit"),
        ({"tokenizer.ggml.merges": "a b"}, "list"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "bool"),
    ],
)
def test_bad_metadata_is_refused(change, message):
    with pytest.raises(ModelLoadError, match=message):
        load_gguf_tokenizer(byte_level_metadata("gpt-2", **change))


def test_missing_tokens_written_as_minus_one():
    metadata = byte_level_metadata("gpt-2", **{"tokenizer.ggml.padding_token_id": 2**32 - 1})
    assert "pad_token" not in load_gguf_tokenizer(metadata).special_tokens
