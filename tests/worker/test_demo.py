"""The demo model, a Q4_1 GGUF: our native reading of its blocks against gguf's and transformers'."""

import gguf
import numpy as np
import torch
import transformers

from asyncengine.checkpoint.gguf import GGUFFile
from asyncengine.checkpoint.gguf_spec import spec_from_gguf

from .tiny import Started, assert_greedy, reference_logits

CONFIG = transformers.LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
)  # fmt: skip


def reference(file):
    """transformers' model with weights dequantized by the gguf package."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(CONFIG)
    state = {}
    for name in file.names():
        view = file.tensor(name)
        kind = gguf.GGMLQuantizationType[view.dtype]
        values = np.array(gguf.quants.dequantize(np.frombuffer(view.data, np.uint8), kind))
        state[name] = torch.from_numpy(values.reshape(view.shape))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(CONFIG)
    return model.eval()


def test_equals_transformers(demo_gguf):
    file = GGUFFile(demo_gguf)
    model, spec = reference(file), spec_from_gguf(file)
    vocabulary = {token: index for index, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    france = [vocabulary[token] for token in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]
    prompts = {0: france, 3: [504, 2365], 1: list(range(700, 750))}
    with Started(spec, demo_gguf, load_format="gguf", max_model_len=256, block_size=16) as started:
        tokens = started.driver().generate(prompts, 5, chunk=32)
        assert tokens[0][0] == vocabulary["ĠParis"]
        for slot, ids in prompts.items():
            assert_greedy(model, ids, tokens[slot])
            started.driver().generate({5: ids}, 1, logprobs=0)
            logits = reference_logits(model, ids)[-1]
            np.testing.assert_allclose(started.logits(1)[0], logits, atol=2e-3)
