"""Which class serves which architecture."""

from ...checkpoint.sharding import Shard
from ...checkpoint.spec import ModelSpec
from ...errors import ModelLoadError
from .decoder import Decoder

__all__ = ["build_model"]

_MODELS = {
    "LlamaForCausalLM": Decoder,
    "MistralForCausalLM": Decoder,
    "Qwen2ForCausalLM": Decoder,
    "Qwen3ForCausalLM": Decoder,
}


def build_model(spec: ModelSpec, shard: Shard) -> Decoder:
    """One rank's part of the model; raises ModelLoadError for an architecture that is not served."""
    model = _MODELS.get(spec.architecture)
    if model is None:
        raise ModelLoadError(
            f"architecture {spec.architecture!r} is not supported; supported: {', '.join(sorted(_MODELS))}"
        )
    return model(spec, shard)
