"""The demo model in transformers, float32: the reference for greedy ids and logprobs."""

import functools
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


@functools.cache
def model(gguf, dtype="float32"):
    directory, file = os.path.split(gguf)
    loaded = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=file,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    return loaded.eval()


@functools.cache
def tokenizer(gguf):
    directory, file = os.path.split(gguf)
    return AutoTokenizer.from_pretrained(directory, gguf_file=file)


def logprobs(gguf, prompt_ids, output_ids, dtype="float32"):
    """Log-probabilities before each output token, [outputs, vocabulary]: one forward over the whole text."""
    with torch.inference_mode():
        logits = model(gguf, dtype)(torch.tensor([prompt_ids + output_ids])).logits[0].float()
    return torch.log_softmax(logits[len(prompt_ids) - 1 : -1], dim=-1)


def assert_greedy(gguf, prompt_ids, output_ids):
    """By induction, `output_ids` is the greedy continuation: each is the most likely after those before."""
    best = logprobs(gguf, prompt_ids, output_ids).argmax(dim=-1).tolist()
    assert output_ids == best
