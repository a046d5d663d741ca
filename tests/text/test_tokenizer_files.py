"""Reading tokenizers from directories, against the tokenizers library and transformers."""

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core
from transformers import AutoTokenizer

from asyncengine.errors import InvalidRequestError, ModelLoadError
from asyncengine.text import bpe
from asyncengine.text.tokenizer import INLINE_CHARACTERS, Tokenizer
from asyncengine.text.tokenizer_files import load_tokenizer
from asyncengine.text.tokenizer_json import Parts, read_tokenizer_json

from .texts import PIECES, train_byte_level, varied


def byte_level():
    core = train_byte_level()
    core.normalizer = normalizers.NFC()
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True, lstrip=True)])
    core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("né", single_word=True)])
    core.add_special_tokens(["<mask>"])
    return core


def template_bpe():
    core = Core(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        PIECES, trainers.BpeTrainer(vocab_size=800, special_tokens=specials, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


def unigram():
    core = Core(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        PIECES * 3, trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>")
    )
    return core


def wordpiece():
    core = Core(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(PIECES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"]))
    return core


def write(directory, core, **files):
    if core is not None:
        core.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        name = name.replace("_json", ".json").replace("_jinja", ".jinja")
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


@pytest.mark.parametrize("make", [byte_level, template_bpe, unigram, wordpiece])
def test_tokenizer_json_is_read_as_it_is(make, tmp_path):
    core = make()
    write(tmp_path, core)
    path = str(tmp_path / "tokenizer.json")
    assert read_tokenizer_json(path).core.to_str() == Core.from_file(path).to_str()
    core = Core.from_file(path)  # its numbers are rounded
    ours = load_tokenizer(tmp_path)
    for text in [*varied(80), "<s>x</s> <think>né</think><mask>"]:
        assert ours.encode(text) == core.encode(text).ids
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == core.encode(text, add_special_tokens=False).ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == core.decode(ids, skip_special_tokens=skip)
    long = "".join(varied(80))
    assert len(long) > INLINE_CHARACTERS and ours.encode(long) == core.encode(long).ids


def test_merges_in_the_older_notation(tmp_path):
    core = byte_level()
    content = json.loads(core.to_str())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    write(tmp_path, None, tokenizer_json=content)
    assert read_tokenizer_json(tmp_path / "tokenizer.json").core.to_str() == core.to_str()


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path):
    core = byte_level()
    core.enable_truncation(4)
    core.enable_padding(length=8)
    write(tmp_path, core)
    text = "one two three four five six"
    core.no_truncation()
    core.no_padding()
    assert load_tokenizer(tmp_path).encode(text) == core.encode(text).ids


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_configuration_equals_transformers(tmp_path, flags):
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "lstrip": False, "special": True},
        "pad_token": None,
        "unk_token": "<new>",
        "added_tokens_decoder": {
            "600": {"content": "<|x|>", "lstrip": False, "normalized": False, "special": True},
        },
        "chat_template": "{{ bos_token }}",
        **flags,
    }
    write(tmp_path, byte_level(), tokenizer_config_json=config)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("x <|x|> y", "a<s>b</s>", "né <new>"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_tokens["unk_token"] == theirs.unk_token and "pad_token" not in ours.special_tokens
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert ours.chat_template == theirs.chat_template


def test_special_tokens_map_is_the_second_choice(tmp_path):
    maps = {"eos_token": "</s>", "bos_token": {"content": "<mask>"}}
    write(tmp_path, byte_level(), special_tokens_map_json=maps, tokenizer_config_json={"bos_token": "<s>"})
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")


def test_where_chat_templates_come_from(tmp_path):
    core = byte_level()
    assert load_tokenizer(write(tmp_path, core)).chat_template is None
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(tmp_path, core, tokenizer_config_json={"chat_template": listed})
    assert load_tokenizer(tmp_path).chat_template == {"default": "a", "tool_use": "b"}
    write(tmp_path, core, chat_template_json={"chat_template": "c"})
    assert load_tokenizer(tmp_path).chat_template == "c"
    write(tmp_path, core, chat_template_jinja="d é")
    assert load_tokenizer(tmp_path).chat_template == "d é"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("e")
    assert load_tokenizer(tmp_path).chat_template == {"default": "d é", "rag": "e"}
    assert load_tokenizer(tmp_path).chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_older_files_are_converted_without_torch_here(tmp_path):
    """Vocabulary and merges alone: only transformers knows what to make of them."""
    model = json.loads(train_byte_level().to_str())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"])
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": "t", "eos_token": "<|endoftext|>"}
    write(tmp_path, None, vocab_json=model["vocab"], tokenizer_config_json=config)
    (tmp_path / "merges.txt").write_text(merges)
    script = (
        "import sys, json; from asyncengine.text.tokenizer_files import load_tokenizer\n"
        "t = load_tokenizer(sys.argv[1])\n"
        "assert not {'torch', 'transformers', 'jinja2'} & set(sys.modules)\n"
        "print(json.dumps([t.encode('Hello, world! 日本'), t.chat_template, t.eos_token]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert json.loads(run.stdout) == [theirs("Hello, world! 日本")["input_ids"], "t", "<|endoftext|>"]


def test_code_of_a_repository_runs_only_if_trusted(tmp_path):
    code = """
import pathlib
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
pathlib.Path(__file__ + ".ran").touch()
pathlib.Path({marker!r}).touch()
class Mine(PreTrainedTokenizerFast):
    def __init__(self, **kwargs):
        super().__init__(tokenizer_object=Tokenizer(models.WordLevel({{"a": 0, "b": 1}}, "a")), eos_token="b")
"""
    marker = tmp_path / "ran"
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    write(tmp_path, None, tokenizer_config_json=config, vocab_txt="a")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "mine.py").write_text(code.format(marker=str(marker)))
    os.environ.setdefault("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ModelLoadError):
        load_tokenizer(tmp_path)
    assert not marker.exists()
    ours = load_tokenizer(tmp_path, trust_remote_code=True)
    assert marker.exists() and ours.encode("b") == [1] and ours.eos_token == "b"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer=.*skip_tokenizer_init=True"),
        ({"tokenizer_json": ""}, "tokenizer.json"),
        ({"tokenizer_json": "{"}, "tokenizer.json"),
        ({"tokenizer_json": "[]"}, "tokenizer.json"),
        ({"tokenizer_json": {"model": {"type": "BPE"}}}, "tokenizer.json"),
        ({"tokenizer_json": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}}, "tokenizer.json"),
        ({"tokenizer_json": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}}, "fit"),
        ({"tokenizer_json": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}}}, "'ab'"),
        ({"tokenizer_json": {"model": {"type": "Mystery"}}}, "tokenizer.json"),
    ],
)
def test_damaged_files_are_refused(tmp_path, files, message):
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(write(tmp_path, None, **files))


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config_json": "{"},
        {"tokenizer_config_json": {"added_tokens_decoder": {"x": 1}}},
        {"tokenizer_config_json": {"added_tokens_decoder": {"1": {"text": "x"}}}},
        {"tokenizer_config_json": {"chat_template": 3}},
        {"tokenizer_config_json": {"chat_template": [{"name": "x"}]}},
        {"chat_template_json": "7"},
    ],
)
def test_damaged_configuration_is_refused(tmp_path, files):
    with pytest.raises(ModelLoadError):
        load_tokenizer(write(tmp_path, byte_level(), **files))


def test_cut_off_files_are_refused(tmp_path):
    whole = byte_level().to_str()
    for n in range(0, len(whole), len(whole) // 40):
        (tmp_path / "tokenizer.json").write_text(whole[:n])
        with pytest.raises(ModelLoadError):
            load_tokenizer(tmp_path)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(ModelLoadError, match="directory"):
        file = tmp_path / "tokenizer.json"
        file.write_text("{}")
        load_tokenizer(file)
    with pytest.raises(ModelLoadError, match="neither an existing path"):
        load_tokenizer("no/such/place at all")


def test_what_cannot_be_encoded_or_decoded(tmp_path):
    ours = load_tokenizer(write(tmp_path, byte_level()))
    for bad in (None, 3, b"x", ["x"], "\ud800", "x" * INLINE_CHARACTERS + "\udfff"):
        with pytest.raises(InvalidRequestError) as error:
            ours.encode(bad)
        assert error.value.parameter == "prompt"
    for bad in (["x"], 3, None):
        with pytest.raises(InvalidRequestError) as error:
            ours.decode(bad)
        assert error.value.parameter == "ids"
    assert ours.decode([2**31, -1, 2**70]) == ""


@pytest.mark.parametrize("make", [byte_level, template_bpe])
@pytest.mark.parametrize("first", [0, 7, 60, 150, 10**6])
def test_merging_in_two_steps_changes_nothing(make, first, tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "FIRST_MERGES", first)
    core = make()
    ours = load_tokenizer(write(tmp_path, core))
    for text in [*varied(80), "<s>x</s> <think>né</think><mask>", "".join(varied(80))]:
        assert ours.encode(text) == core.encode(text).ids
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == core.decode(ids)
    assert ours.vocab_size == core.get_vocab_size()
    assert all(ours.id_to_token(i) == core.id_to_token(i) for i in range(1000))


letters = st.text("abcd", min_size=1, max_size=3)


@settings(max_examples=1500, deadline=None)
@given(
    merges=st.lists(st.tuples(letters, letters), max_size=30, unique_by=lambda m: m),
    first=st.integers(0, 12),
    text=st.text("abcd ", max_size=60),
    whole_words=st.booleans(),
)
def test_any_merges_in_two_steps(merges, first, text, whole_words):
    """Also those that training never makes: parts made late, several ways to one token."""
    tokens = dict.fromkeys(
        ["a", "b", "c", "d", *(part for merge in merges for part in (*merge, "".join(merge)))]
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    oracle = Core(models.BPE(vocab, merges, ignore_merges=whole_words))
    oracle.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "FIRST_MERGES", first)
        split = bpe.split_bpe(vocab, merges, [], ignore_merges=whole_words)
    core = Core(split.model)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert Tokenizer(Parts(core, split.late, split.tokens)).encode(text) == oracle.encode(text).ids


def test_a_long_word_takes_no_quadratic_time(monkeypatch):
    monkeypatch.setattr(bpe, "FIRST_MERGES", 1)
    merges = [("a" * n, "a" * n) for n in (1, 2, 4, 8, 16)]
    vocab = {"a" * n: n for n in (1, 2, 4, 8, 16, 32)}
    split = bpe.split_bpe(vocab, merges, [])
    start = time.perf_counter()
    ids = Tokenizer(Parts(Core(split.model), split.late, split.tokens)).encode("a" * 400_001)
    assert ids == [32] * (400_001 // 32) + [1]
    assert time.perf_counter() - start < 20.0  # quadratic work takes hours
