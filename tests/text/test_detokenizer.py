"""Streamed text against decoding all ids at once."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Core

from asyncengine.text.detokenizer import ByteDetokenizer, WindowDetokenizer, make_detokenizer
from asyncengine.text.gguf_tokenizer import load_gguf_tokenizer
from asyncengine.text.tokenizer import Tokenizer
from asyncengine.text.tokenizer_json import Parts

from .texts import PIECES, any_text, train_byte_level, train_sentencepiece, varied


def make_byte_level():
    core = train_byte_level()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    core.add_tokens([AddedToken("né", special=False), AddedToken("日本", special=False)])
    return Tokenizer(Parts(core))


def make_sentencepiece():
    tokens, scores, types = train_sentencepiece()
    return load_gguf_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )


def make_unigram():
    core = Core(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        PIECES * 3,
        trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>", "<s>"]),
    )
    return Tokenizer(Parts(core))


byte_level, sentencepiece, unigram = make_byte_level(), make_sentencepiece(), make_unigram()


def stream(detokenizer, ids, cuts=()):
    """Pushes ids in pieces cut at `cuts`, or one at a time."""
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)}) if cuts else range(len(ids) + 1)
    edges = list(edges)
    pieces = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, detokenizer.finish()]


cuts = st.lists(st.integers(0, 100), max_size=4)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=40), skip=st.booleans(), cuts=cuts)
def test_byte_level_any_ids(ids, skip, cuts):
    detokenizer = make_detokenizer(byte_level, skip_special_tokens=skip)
    assert isinstance(detokenizer, ByteDetokenizer)
    assert "".join(stream(detokenizer, ids, cuts)) == byte_level.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=any_text, prompt=any_text)
def test_sentencepiece_continues_a_prompt(text, prompt):
    prompt_ids, ids = sentencepiece.encode("x" + prompt), sentencepiece.encode(text, add_special_tokens=False)
    detokenizer = make_detokenizer(sentencepiece, prompt_ids)
    assert isinstance(detokenizer, ByteDetokenizer)
    known = sentencepiece.decode(prompt_ids)
    whole = sentencepiece.decode(prompt_ids + ids)
    if "\ufffd" not in known:
        assert known + "".join(stream(detokenizer, ids)) == whole


@settings(max_examples=200, deadline=None)
@given(text=any_text, skip=st.booleans(), cuts=cuts)
def test_sentencepiece_from_the_beginning(text, skip, cuts):
    ids = sentencepiece.encode(text)
    detokenizer = make_detokenizer(sentencepiece, [1], skip_special_tokens=skip)
    expected = sentencepiece.decode(ids, skip_special_tokens=skip)
    given_text = "".join(stream(detokenizer, ids[1:], cuts))
    assert given_text == (expected if skip else expected.removeprefix("<s>"))


@settings(max_examples=200, deadline=None)
@given(text=any_text, prompt=st.sampled_from(PIECES))
def test_window_continues_a_prompt(text, prompt):
    prompt_ids = unigram.encode("x" + prompt)
    ids = [i for i in unigram.encode(text) if unigram.token_text(i)]
    detokenizer = make_detokenizer(unigram, prompt_ids)
    assert isinstance(detokenizer, WindowDetokenizer)
    assert unigram.decode(prompt_ids) + "".join(stream(detokenizer, ids)) == unigram.decode(prompt_ids + ids)


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece])
def test_window_agrees_with_the_byte_table(tokenizer):
    prompt = tokenizer.encode("A prompt.")
    for text in varied(60):
        ids = tokenizer.encode(text, add_special_tokens=False)
        window = stream(WindowDetokenizer(tokenizer, prompt, True), ids)
        assert "".join(window) == "".join(stream(make_detokenizer(tokenizer, prompt), ids))


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece])
def test_no_piece_ends_inside_a_character(tokenizer):
    ids = tokenizer.encode("日本語 😀 👩‍👩‍👧‍👦 café ꙮ𝔘", add_special_tokens=False)
    for detokenizer in (make_detokenizer(tokenizer), WindowDetokenizer(tokenizer, (), True)):
        pieces = stream(detokenizer, ids)
        assert not any("\ufffd" in piece for piece in pieces)
        assert "" in pieces


def test_incomplete_characters_come_out_at_the_end():
    grinning = byte_level.encode("😀")
    assert len(grinning) > 1
    detokenizer = make_detokenizer(byte_level)
    assert detokenizer.push(grinning[:-1]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    euro = [sentencepiece.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    detokenizer = make_detokenizer(sentencepiece, [1])
    assert [detokenizer.push([i]) for i in euro] == ["", "", "€"]


def test_window_stays_small_and_survives_endless_broken_bytes():
    euro = sentencepiece.token_to_id("<0xE2>")
    detokenizer = WindowDetokenizer(sentencepiece, sentencepiece.encode("a"), True)
    for token in [euro] * 200 + [2] * 200 + sentencepiece.encode("words and words " * 20):
        detokenizer.push([token])
        assert len(detokenizer._ids) <= 64
    assert detokenizer.push(sentencepiece.encode(" end.", add_special_tokens=False)).endswith("end.")
