"""Every architecture and rope rule against transformers: logits and greedy ids in float32."""

import numpy as np
import pytest

from .test_rope import RULES
from .tiny import Started, assert_greedy, make_model, prompt, reference_logits, spec_of

CASES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa-wide-heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-sizes": (
        "Llama",
        {"vocab_size": 197, "intermediate_size": 75, "hidden_size": 52, "head_dim": 10},
    ),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 11}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied-window": (
        "Qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}
for rule, values in RULES.items():
    if rule != "default":
        parameters = {"rope_type": rule.split("-")[0], "rope_theta": 10000.0, **values}
        CASES[f"rope-{rule}"] = ("Llama", {"rope_parameters": parameters})


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    architecture, fields = CASES[request.param]
    model = make_model(architecture, **fields)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def test_logits_and_greedy_ids(case):
    model, directory = case
    prompts = {slot: prompt(length, model.config.vocab_size) for slot, length in ((3, 40), (0, 1), (6, 17))}
    with Started(spec_of(directory), directory) as started:
        alone = {}
        for slot, ids in prompts.items():
            alone |= started.driver().generate({slot: ids}, 12, logprobs=0)
            assert_greedy(model, ids, alone[slot])
            logits = reference_logits(model, ids + alone[slot][:-1])[-1]
            np.testing.assert_allclose(started.logits(1)[0], logits, atol=1e-4, rtol=1e-4)
        # All in one batch, entering one after another, in chunks: prefill and decode rows are mixed.
        assert started.driver().generate(prompts, 12, chunk=7, stagger=2) == alone
        assert started.captured.operations > 0
