"""A small transformer, trained from scratch twice: with a mask of ours, and with the same mask as a
dense matrix in PyTorch's own attention. The two loss curves coincide.

The task is to go on with a pattern that repeats: what comes next stood one period ago, which is
within the window, so the sparse mask loses nothing. On a GPU the gradients come from kernels, on a
CPU from the torch backend.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from maskdsl import LastQ, Shape, Sink, Window, compile, dense

MASK = Sink(4) | Window(64) | LastQ(32)
WORDS, PERIOD = 32, 24  # tokens there are; after how many a pattern repeats
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    """Attention and a small network, each added to what comes in."""

    def __init__(self, dim: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, dim] --> [B, L, dim]."""
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for t in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.between(x))))


class Model(nn.Module):
    """Token and position embeddings, some layers, logits of the next token."""

    def __init__(self, length: int, dim: int, layers: int, attend: Attend) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, dim), nn.Embedding(length, dim)
        self.layers = nn.Sequential(*(Layer(dim, dim // 32, attend) for _ in range(layers)))
        self.logits = nn.Linear(dim, WORDS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, L] --> [B, L, WORDS]."""
        x = self.tokens(tokens) + self.places.weight[:tokens.shape[1]]
        return self.logits(self.layers(x))


def make_batch(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """int64[batch, length + 1]: another random pattern in every row, over and over."""
    pattern = torch.randint(WORDS, (batch, PERIOD), generator=generator)
    return pattern.repeat(1, length // PERIOD + 2)[:, :length + 1]


def train(attend: Attend, steps: int, sizes: tuple[int, int, int, int], device: str) -> list[float]:
    """The loss of every step; sizes: batch, length, dim, layers."""
    batch, length, dim, layers = sizes
    torch.manual_seed(0)  # the same model, then the same data
    model = Model(length, dim, layers, attend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = make_batch(batch, length, generator).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The loss curves; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(losses, style, label=name)
    axes.set(xlabel="step", ylabel="loss", title=f"training under {MASK!r}")
    axes.legend()
    figure.savefig(path)


def main(steps: int = 400, sizes: tuple[int, int, int, int] | None = None,
         path: str = "train.png") -> dict[str, list[float]]:
    """Train both, compare, draw; returns the curves."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = sizes or ((8, 2048, 256, 4) if device == "cuda" else (8, 128, 64, 2))
    ours = compile(MASK)
    live = dense(ours.mask, Shape(sizes[1], sizes[1]), device=device)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=live)

    curves = {f"maskdsl ({ours.backend})": train(ours, steps, sizes, device),
              "PyTorch, dense mask": train(plain, steps, sizes, device)}
    gap = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    for name, losses in curves.items():
        print(f"{name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
    print(f"largest difference of a step: {gap:.4f}")
    draw(curves, Path(path))
    print(f"picture: {path}")
    return curves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--picture", default="train.png")
    arguments = parser.parse_args()
    main(arguments.steps, path=arguments.picture)
