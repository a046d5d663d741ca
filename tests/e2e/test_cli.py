"""The command line, as typed."""

import subprocess
import sys

import pytest

from asyncengine.serve import cli


def asyncengine(*words, stdin=""):
    command = [sys.executable, "-m", "asyncengine", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)


def test_chat(demo_gguf):
    done = asyncengine("chat", "What is the capital of France?", "--max-tokens", "16")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""


def test_chat_conversation(demo_gguf):
    done = asyncengine("chat", demo_gguf, "--max-tokens", "12", stdin="What is 2+2?\n\nThanks!\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4
    assert "4" in done.stdout


def test_generate(demo_gguf):
    done = asyncengine("generate", demo_gguf, "The capital of France is", "--max-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    piped = asyncengine(
        "generate", "--model", demo_gguf, "--max-tokens", "5", stdin="The capital of France is"
    )
    assert piped.stdout == done.stdout


def test_info(demo_gguf):
    done = asyncengine("info", "--max-model-len", "256")
    assert done.returncode == 0, done.stderr
    for said in ("max_model_len            256", "started in", "load", "capture"):
        assert said in done.stdout


def test_errors_are_one_line(demo_gguf):
    done = asyncengine("chat", "--model", "/nowhere", "hello")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "/nowhere" in done.stderr
    done = asyncengine("chat", "hello", "--temperature", "nan")
    assert done.returncode == 1 and "temperature" in done.stderr


@pytest.mark.parametrize(
    ("words", "model", "prompt"),
    [
        ([], None, None),
        (["What is it?"], None, "What is it?"),
        (["org/name"], "org/name", None),
        (["org/name", "hi"], "org/name", "hi"),
        (["model.gguf", "hi"], "model.gguf", "hi"),
        (["--model", "m", "hi"], "m", "hi"),
    ],
)
def test_words(words, model, prompt):
    args = cli._parser().parse_args(["chat", *words])
    cli._split_words(args)
    assert (args.model, args.prompt) == (model, prompt)
