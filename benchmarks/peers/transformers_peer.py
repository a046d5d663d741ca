"""transformers' `generate`. Model: a Hugging Face directory. Precision: bf16 or float32."""

from typing import Any

from runner import Engine, serve


def start(job: dict[str, Any]) -> Engine:
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[job["precision"]]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    model.eval()

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        if len({len(prompt) for prompt in prompts}) > 1:
            return [generate([prompt], new)[0] for prompt in prompts]
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows

    return Engine(transformers.__version__, generate)


if __name__ == "__main__":
    serve(start)
