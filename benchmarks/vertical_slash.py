"""Vertical-slash with given indices at 128K: ours, conversion included, beside MInference's kernel.

MInference's own Triton kernel and index conversion are measured where they are found: set
MASKDSL_MINFERENCE to a folder with a `peer.py` that has `convert` and `attention` (see
benchmarks/README.md); nothing of it is part of this project.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

import maskdsl
from benchmarks.measure import (
    DIM,
    HEADS,
    KV_HEADS,
    MASKS,
    Report,
    device,
    make_inputs,
    mask_of,
    time_ms,
)
from maskdsl import Causal, Mask, VerticalSlash, VSIndices
from maskdsl.codegen.hopper import is_hopper

LENGTH = 131072
SIZES = ((1000, 6096), (512, 2048))


def make_indices(length: int, vertical: int, slash: int, heads: int, run: int,
                 seed: int = 0) -> VSIndices:
    """Random columns, and slashes in runs of `run` neighbours from multiples of it, 0.. among them;
    others in every head."""
    generator = torch.Generator(device=device()).manual_seed(seed)

    def draw(size: int, count: int) -> torch.Tensor:
        order = torch.rand(1, heads, size, device=device(), generator=generator)
        order[..., 0] = 2  # the first column, the first run: always there
        return order.topk(count).indices

    starts = draw(length // run, slash // run) * run
    near = torch.arange(run, device=device())
    slashes = (starts[..., None] + near).flatten(-2)
    return VSIndices(draw(length, vertical).int(), slashes.int())


def count_live(data: VSIndices, length: int) -> int:
    """Live pairs over all heads: |V or S| under the causal mask, from sets, never pair by pair."""
    heads = data.slash.shape[1]
    total = 0
    for h in range(heads):
        s = torch.zeros(length, dtype=torch.long, device="cuda")
        s[data.slash[0, h].long()] = 1
        v = torch.zeros_like(s)
        v[data.vertical[0, h].long()] = 1
        below = s.cumsum(0)
        columns = v.nonzero().flatten()
        # a column k is seen by length - k rows, and distance d from it lies on a slash for s[d]
        doubled = below[length - 1 - columns]
        total += int((below.sum() + (length - columns).sum() - doubled.sum()).item())
    return total


def load_peer() -> Any:
    """MInference's kernels, or None where they are not at hand."""
    folder = os.environ.get("MASKDSL_MINFERENCE")
    if not folder:
        return None
    spec = importlib.util.spec_from_file_location("minference_peer", f"{folder}/peer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_peer(report: Report, peer: Any, row: dict[str, Any], data: VSIndices,
                 qkv: tuple[torch.Tensor, ...], expected: torch.Tensor) -> None:
    """MInference on the same indices: conversion, attention, and what repeating K and V takes."""
    q, k, v = qkv
    group = HEADS // k.shape[1]
    heads = HEADS // data.slash.shape[1]
    columns = data.vertical.repeat_interleave(heads, 1).sort(-1).values.contiguous()
    slashes = data.slash.repeat_interleave(heads, 1).sort(-1, descending=True).values.contiguous()
    lengths = torch.tensor([LENGTH], dtype=torch.int32, device="cuda")

    def repeat() -> tuple[torch.Tensor, torch.Tensor]:
        return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    wide_k, wide_v = repeat()
    lists = peer.convert(lengths, columns, slashes, LENGTH)
    out = peer.attention(q, wide_k, wide_v, *lists, lengths, DIM**-0.5)
    gap = (out - expected).abs().max().item()
    report.add(**row, kernel="MInference, attention",
               ms=time_ms(peer.attention, q, wide_k, wide_v, *lists, lengths, DIM**-0.5),
               largest_difference_to_the_same_superset=gap)
    report.add(**row, kernel="MInference, conversion", ms=time_ms(
        peer.convert, lengths, columns, slashes, LENGTH))
    report.add(**row, kernel="MInference, K and V repeated for 32 heads", ms=time_ms(repeat))


def measure_hopper(report: Report, row: dict[str, Any], name: str, mask: Mask, data: VSIndices,
                   qkv: tuple[torch.Tensor, ...], live: int | None) -> None:
    """The same mask on the Hopper kernel, held against the portable one's output."""
    attn = maskdsl.compile(Causal() & mask, backend="hopper")
    expected = maskdsl.compile(Causal() & mask, backend="triton")(*qkv, vs=data)
    gap = (attn(*qkv, vs=data) - expected).abs().max().item()
    ms = time_ms(attn, *qkv, vs=data)
    extra = {"tflops": 4 * DIM * live / ms / 1e9} if live else {}
    report.add(**row, kernel=f"maskdsl {name} on Hopper, conversion included", ms=ms,
               largest_difference_to_the_portable_kernel=gap, **extra)


def run(report: Report) -> None:
    """Two sizes, indices for each query head and for each key/value head."""
    peer = load_peer()
    qkv = make_inputs(LENGTH)
    triangle = mask_of(next(iter(MASKS.values())))
    alone = time_ms(maskdsl.compile(triangle), *qkv)
    report.add(mask=repr(triangle), kernel="maskdsl", ms=alone)
    for vertical, slash in SIZES:
        for heads in (HEADS, KV_HEADS):
            data = make_indices(LENGTH, vertical, slash, heads, 64)
            live = count_live(data, LENGTH) * (HEADS // heads)
            row: dict[str, Any] = {"vertical": vertical, "slash": slash, "index_heads": heads}
            masks: dict[str, Mask] = {
                "exact": VerticalSlash("vs"), "block64": VerticalSlash("vs", "block64"),
                "triangle or exact": triangle | VerticalSlash("vs")}
            for name, mask in masks.items():
                attn = maskdsl.compile(Causal() & mask)
                ms = time_ms(attn, *qkv, vs=data)
                extra = {"tflops": 4 * DIM * live / ms / 1e9} if name == "exact" else {}
                report.add(**row, kernel=f"maskdsl {name}, conversion included", ms=ms, **extra)
                if is_hopper():
                    measure_hopper(report, row, name, mask, data, qkv,
                                   live if name == "exact" else None)
            if peer is not None and heads == HEADS:
                wide = maskdsl.compile(VerticalSlash("vs", "block64"))(*qkv, vs=data)
                measure_peer(report, peer, row, data, qkv, wide)
