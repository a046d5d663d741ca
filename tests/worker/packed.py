"""Tiny checkpoints with quantized linears, and transformers models that hold the weights they stand for."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from ..codes import Coded
from .tiny import make_model

METHODS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            }
        },
    },
}


def quantization_config(method, group=32, bits=4, **fields):
    """Of config.json; `fields` on the outermost level."""
    config = json.loads(json.dumps(METHODS[method])) | fields
    if method == "compressed-tensors":
        weights = config["config_groups"]["group_0"]["weights"]
        weights |= {"num_bits": bits, "group_size": group, "strategy": "channel" if group == -1 else "group"}
    else:
        config |= {"bits": bits, "group_size": group}
    return config


def linears(model, ends):
    """Names of modules."""
    return [name for name in dict(model.named_modules()) if name.endswith(ends)]


class Packed:
    """A random model whose linears, but those that `skip` names, are codes in `layout`."""

    def __init__(
        self, architecture, layout, group=32, bits=4, *, symmetric=False, bfloat16=False, indexed=(), skip=(),
        ends=("_proj",), extra=None, shift=1, **fields,
    ):  # fmt: skip
        self.model = make_model(architecture, **fields)
        self.layout, self.config = layout, quantization_config(layout, group, bits, **(extra or {}))
        self.coded = {}
        for number, name in enumerate(linears(self.model, ends)):
            if any(part in name for part in skip):
                continue
            n, k = self.model.get_submodule(name).weight.shape
            index = None
            if group != -1 and any(part in name for part in indexed):
                index = np.random.default_rng(number).permutation(np.arange(k) // group)
            coded = Coded(n, k, group, bits=bits, symmetric=symmetric, index=index, seed=number)
            self.coded[name] = coded.bfloat16_scales() if bfloat16 else coded
        self.shift = shift
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.half())
            for name, coded in self.coded.items():
                self.model.get_submodule(name).weight.copy_(torch.from_numpy(coded.weight))

    def with_rounded_minima(self):
        """The model as the engine holds it: products of scales and zero points in half precision."""
        with torch.no_grad():
            for name, coded in self.coded.items():
                weight = coded.weight if coded.symmetric else coded.rounded_weight
                self.model.get_submodule(name).weight.copy_(torch.from_numpy(weight))
        return self.model

    def tensors(self):
        found = {}
        for name, tensor in self.model.state_dict().items():
            if name.removesuffix(".weight") not in self.coded:
                found[name] = tensor.half().contiguous()
        if self.model.config.tie_word_embeddings:
            found.pop("lm_head.weight", None)
        for name, coded in self.coded.items():
            for part, values in coded.stored(self.layout, self.shift).items():
                found[f"{name}.{part}"] = torch.from_numpy(np.ascontiguousarray(values))
            if hasattr(coded, "patterns"):
                patterns = coded.patterns if self.layout == "compressed-tensors" else coded.patterns.T
                part = "weight_scale" if self.layout == "compressed-tensors" else "scales"
                scales = torch.from_numpy(np.ascontiguousarray(patterns).view(np.int16))
                found[f"{name}.{part}"] = scales.view(torch.bfloat16)
        return found

    def save(self, directory, **changed):
        """`changed`: tensors in place of the right ones, None for none of that name."""
        tensors = {name: t for name, t in (self.tensors() | changed).items() if t is not None}
        save_file(tensors, directory / "model.safetensors")
        config = self.model.config.to_dict() | {
            "architectures": [type(self.model).__name__],
            "dtype": "float16",
            "quantization_config": self.config,
        }
        (directory / "config.json").write_text(json.dumps(config, default=str))
        return directory
