"""What a model is, in numbers: the one description that both towers read.

Made from a Hugging Face `config.json` (`config.py`) or from GGUF metadata (`gguf_spec.py`), with every
value typed and every default explicit, so that nothing further down looks into a configuration again.
"""

from typing import Literal

import msgspec

__all__ = ["DType", "KVDType", "ModelSpec", "RopeScaling", "WeightPacking"]

DType = Literal["float32", "bfloat16", "float16"]
KVDType = Literal["float32", "bfloat16", "float16", "int8", "fp8_e4m3"]
"""Type of stored keys and values; int8 has a scale for every token and head, fp8 one for all."""


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a rotary-embedding scaling rule; names as in Hugging Face configs."""

    type: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """None: from `mscale` and `mscale_all_dim` where both are set, else 0.1 ln(factor) + 1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class WeightPacking(msgspec.Struct, frozen=True, kw_only=True):
    """How a checkpoint keeps quantized linears; those that it does not are in its plain type."""

    method: Literal["awq", "gptq", "compressed-tensors"]
    bits: int
    group_size: int
    """Input features that share a scale; -1: all of them do."""
    zero_shift: int = 0
    """What is to be added to stored zero points."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only language model."""

    architecture: str
    """The Hugging Face class name, e.g. `LlamaForCausalLM`: the key of the model registry."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    hidden_act: str
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_factors: tuple[float, ...] | None = None
    """One divisor per rotary frequency, `head_dim / 2` of them, as GGUF files store Llama 3's scaling."""
    max_position: int
    """The context length the model declares, in tokens."""
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Bias on the attention output projection."""
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int, ...]
    """Per layer: how many of the newest positions a token sees, itself included; 0 is all of them."""
    dtype: DType | None
    """Type of the stored weights; None where they are quantized or the configuration does not say."""
    packing: WeightPacking | None = None
    """Of quantized safetensors. The weights beside them, such as embeddings, have `dtype`."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def max_context(self) -> int:
        """The longest context that the rotary embedding is made for, in tokens: `max_position`, or what
        linear, dynamic and YaRN scaling stretch it to."""
        scaling = self.rope_scaling
        if scaling is None or scaling.type == "llama3":
            return self.max_position
        return max(self.max_position, int(scaling.factor * scaling.original_max_position))
