"""Models and workloads of gpu.py, and what the hardware allows them: floors from bytes and operations.

A decode step reads every weight but the embedding table once, and the keys and values of all sequences; its
matrix products also take their operations. A prefill is bound by operations alone; its head sees one row.
"""

import random
from typing import Any, NamedTuple

__all__ = [
    "BANDWIDTH",
    "FLOPS",
    "LLAMA_8B",
    "NANO_TOKENS",
    "QWEN3_06B",
    "SHAPES",
    "Floor",
    "Request",
    "nano_vllm",
    "prompt",
]

BANDWIDTH = "read bandwidth"
FLOPS = "bf16 matmul"
"""Names of the measured rates: TB/s and TFLOP/s."""

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
"""Llama-3.1-8B."""

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": None,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
"""Qwen3-0.6B."""

SHAPES = {"Llama-3.1-8B": LLAMA_8B, "Qwen3-0.6B": QWEN3_06B}


class Floor(NamedTuple):
    """The least times a model can take, in seconds, at measured rates. Weights and cache of 2 bytes."""

    shape: dict[str, Any]
    bandwidth: float
    """Bytes per second."""
    flops: float
    """Operations per second of a large matrix product."""

    @property
    def head_params(self) -> int:
        return int(self.shape["vocab_size"] * self.shape["hidden_size"])

    @property
    def layer_params(self) -> int:
        """Of the linears of all layers."""
        s = self.shape
        hidden, heads = s["hidden_size"], s["num_attention_heads"] + s["num_key_value_heads"]
        one = 2 * hidden * heads * s["head_dim"] + 3 * hidden * s["intermediate_size"]
        return int(one * s["num_hidden_layers"])

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        s = self.shape
        return int(2 * 2 * s["num_hidden_layers"] * s["num_key_value_heads"] * s["head_dim"])

    def decode(self, batch: int, context: float) -> float:
        """One step of `batch` sequences of `context` tokens each."""
        params = self.layer_params + self.head_params
        return (
            max(2 * params / self.bandwidth, 2 * params * batch / self.flops)
            + batch * context * self.kv_bytes / self.bandwidth
        )

    def prefill(self, tokens: int) -> float:
        """One prompt of `tokens`."""
        s = self.shape
        attention = 2 * tokens**2 * s["num_attention_heads"] * s["head_dim"] * s["num_hidden_layers"]
        return (2 * self.layer_params * tokens + attention + 2 * self.head_params) / self.flops


class Request(NamedTuple):
    prompt: list[int]
    max_tokens: int


NANO_TOKENS = 133_966
"""Output tokens of nano-vllm's workload, as its README has it."""


def nano_vllm() -> list[Request]:
    """The workload of nano-vllm's benchmark: 256 sequences, 100 to 1,024 ids in and out, seed 0."""
    draw = random.Random(0).randint
    prompts = [[draw(0, 10000) for _ in range(draw(100, 1024))] for _ in range(256)]
    return [Request(ids, draw(100, 1024)) for ids in prompts]


def prompt(number: int, length: int) -> list[int]:
    """Ids that no other number shares from the first on, so that nothing comes from a cache."""
    return [(number * 7919 + i * 13) % 40000 + 100 for i in range(length)]
