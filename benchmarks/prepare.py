"""A GGUF file in the forms that the engines read, made once in a folder of the user's choice.

hf/                  Hugging Face checkpoint, bfloat16: what every other form is made from
reference.json       prompts, and their greedy completions by transformers in float32
llama.cpp-*.gguf     BF16, Q8_0, Q4_0 (Q4_1 and what else there is: the file itself)
openvino-*/          fp16, int8, int4 in groups of 64 or 32
ctranslate2-int8/
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["prepare"]

CHECK_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived",
    "The three primary colours are",
    "To make a good cup of tea, first",
    "In 1969, two men walked on",
    "The quick brown fox",
    "A list of the planets, from the sun outwards:",
    "import numpy as np\n\n# Solve a linear system\n",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\nI am writing to",
    "If a train leaves at noon and travels at sixty miles an hour, then by three o'clock",
    "Q: What is the largest ocean on Earth?\nA:",
    "The difference between a list and a tuple in Python is",
    "Roses are red,\nviolets are",
)


def prepare(gguf: Path, folder: Path, peers: dict[str, str]) -> None:
    """Makes what is missing of the forms that `peers` (see compare.py) read."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = folder / "hf"
    _make(hf, lambda path: _checkpoint(gguf, path))
    _make(folder / "reference.json", lambda path: _reference(hf, path))
    if "llama.cpp" in peers:
        quantize = str(Path(peers["llama.cpp"]) / "llama-quantize")
        bf16 = folder / "llama.cpp-bf16.gguf"
        _make(bf16, lambda path: _run(quantize, "--allow-requantize", gguf, path, "BF16"))
        _make(folder / "llama.cpp-int8.gguf", lambda path: _run(quantize, bf16, path, "Q8_0"))
        _make(folder / "llama.cpp-int4.gguf", lambda path: _run(quantize, bf16, path, "Q4_0"))
    if "openvino" in peers:
        group = "64" if json.loads((hf / "config.json").read_text())["hidden_size"] % 64 == 0 else "32"
        int4 = ("int4", "--group-size", group, "--ratio", "1.0")
        tool = _beside(peers["openvino"], "optimum-cli")
        task = ("--task", "text-generation-with-past")
        export = (tool, "export", "openvino", "-m", hf, *task, "--weight-format")
        _make(folder / "openvino-bf16", lambda path: _run(*export, "fp16", path))
        _make(folder / "openvino-int8", lambda path: _run(*export, "int8", path))
        _make(folder / "openvino-int4", lambda path: _run(*export, *int4, path))
    if "ctranslate2" in peers:
        convert = _beside(peers["ctranslate2"], "ct2-transformers-converter")
        _make(
            folder / "ctranslate2-int8",
            lambda path: _run(convert, "--model", hf, "--quantization", "int8", "--output_dir", path),
        )


def _make(path: Path, make: Callable[[Path], object]) -> None:
    """Nothing half made is left under the final name."""
    if path.exists():
        return
    print(f"making {path}", flush=True)
    part = path.with_name("part-" + path.name)
    if part.is_dir():
        shutil.rmtree(part)
    part.unlink(missing_ok=True)
    make(part)
    part.rename(path)


def _beside(python: str, tool: str) -> str:
    return str(Path(python).parent / tool)


def _run(*command: object) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # Tools of a virtual environment look for its other tools by name.
    environment["PATH"] = f"{Path(str(command[0])).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}")


def _checkpoint(gguf: Path, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(**source).save_pretrained(path)


def _reference(hf: Path, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(hf)
    model: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model.eval()
    prompts = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    ids = []
    with torch.inference_mode():
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=CHECK_TOKENS,
                min_new_tokens=CHECK_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            ids.append(out[0, len(prompt) :].tolist())
    path.write_text(json.dumps({"prompts": prompts, "new": CHECK_TOKENS, "ids": ids}))
