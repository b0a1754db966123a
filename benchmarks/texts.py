"""Texts that every machine has: Python's own library and its documentation, and passkey prompts."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import torch

from maskdsl import Full, Mask
from maskdsl.patterns import LayerPolicy, streaming_llm, triangle, triangle_mix

SOURCES = ("argparse", "typing", "subprocess", "tarfile", "inspect", "ipaddress")
FILLER = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back "
          "again. ")
POLICIES: dict[str, LayerPolicy | Mask] = {
    "dense": Full(),
    "StreamingLLM (4 + 508)": streaming_llm(4, 508),
    "triangle in every layer": triangle(),
    "TriangleMix, dense 5 and 11": triangle_mix(18, (5, 11)),
    "TriangleMix, dense 5": triangle_mix(18, (5,)),
    "TriangleMix, dense 17": triangle_mix(18, (17,)),
}


def python_source(name: str) -> str:
    """The text of a module of the standard library."""
    return Path(str(importlib.import_module(name).__file__)).read_text(encoding="utf-8")


def english_text() -> str:
    """The language reference as Python ships it."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[key] for key in sorted(topics.topics))


def text_ids(tokenizer: Any, kind: str, number: int, length: int) -> torch.Tensor:
    """int[1, length], one of several texts of a kind, "python" or "english"."""
    if kind == "python":
        text = python_source(SOURCES[number])
    else:
        whole = english_text()
        text = whole[number * len(whole) // 8:][:length * 8]
    ids: torch.Tensor = tokenizer(text[:length * 8], return_tensors="pt").input_ids
    if ids.shape[1] < length:
        raise ValueError(f"{kind} text {number} has {ids.shape[1]} tokens, not {length}")
    return ids[:, :length]


def passkey_ids(tokenizer: Any, length: int, depth: float, seed: int) -> tuple[torch.Tensor, str]:
    """(int[1, about length], the key): a five-digit key at `depth` (0 = start) of filler text."""
    key = str(random.Random(seed).randint(10000, 99999))
    head = "There is an important number hidden inside a lot of irrelevant text. Remember it.\n"
    needle = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    tail = "\nWhat is the pass key? The pass key is "
    fixed = len(tokenizer(head + needle + tail).input_ids)
    many = max(0, length - fixed) // len(tokenizer(FILLER, add_special_tokens=False).input_ids)
    before = round(many * depth)
    text = head + FILLER * before + needle + FILLER * (many - before) + tail
    return tokenizer(text, return_tensors="pt").input_ids, key
