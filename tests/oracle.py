"""Check a backend against dense attention in float64, by FlashAttention's tolerance rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import maskdsl
from maskdsl import Causal, Mask, Shape, dense, dense_attention
from maskdsl.scores import ScoreMod


@dataclass(frozen=True)
class Case:
    """One call. Lengths in tokens; `options` go to `compile`."""

    mask: Mask
    q_len: int
    kv_len: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 32
    value_dim: int = 0
    dtype: torch.dtype = torch.float32
    causal: bool = True
    q_offset: int | None = None
    total_len: int | None = None
    scale: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=dict)
    scores: tuple[ScoreMod, ...] = ()
    data: dict[str, torch.Tensor] = field(default_factory=dict)  # of the score modifiers

    @property
    def shape(self) -> Shape:
        return Shape(self.q_len, self.kv_len, self.q_offset, self.total_len)

    @property
    def whole(self) -> Mask:
        return Causal() & self.mask if self.causal else self.mask


def make_inputs(case: Case, device: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random q, k, v [B, H, L, D] of the case."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(case.batch, heads, length, dim, generator=generator, device=device,
                           dtype=torch.float32).to(case.dtype)

    return (draw(case.heads, case.q_len, case.dim), draw(case.kv_heads, case.kv_len, case.dim),
            draw(case.kv_heads, case.kv_len, case.value_dim or case.dim))


def run(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        **data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the compiled mask; data: of the score modifiers, for the case's own."""
    attn = maskdsl.compile(case.mask, causal=case.causal, scores=case.scores, **case.options)
    return attn(q, k, v, scale=case.scale, q_offset=case.q_offset, total_len=case.total_len,
                return_lse=True, **case.slots, **(data or case.data))


def check_case(case: Case, device: str = "cpu") -> None:
    """Values within twice PyTorch's own error, lse tight, dead rows 0 and -inf."""
    q, k, v = make_inputs(case, device)
    live = dense(case.whole, case.shape, case.batch, case.heads, device, case.slots)
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), live, case.scale)
    plain, _ = dense_attention(q, k, v, live, case.scale)
    out, lse = run(case, q, k, v)
    assert out.dtype == case.dtype and out.shape == exact.shape
    assert not out.isnan().any() and not lse.isnan().any()
    check_close(out, exact, plain, case)
    check_lse(lse, exact_lse, case)
    check_counts(case, q, k, v, live)


def check_close(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, case: Case) -> None:
    """|out - exact| <= 2 |plain - exact| + rounding, as in FlashAttention's own tests: theirs is
    the rounding that adding and taking away 0.3 causes, which keeps tiny outputs from failing."""
    if not out.numel():
        return
    error = (out.double() - exact).abs().max().item()
    rounded = exact.to(case.dtype)
    rounding = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item() \
        + 2 * torch.finfo(case.dtype).eps * exact.abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + rounding
    assert error <= allowed, f"{case}: error {error:.3e}, allowed {allowed:.3e}"


def check_lse(lse: torch.Tensor, exact: torch.Tensor, case: Case) -> None:
    """Dead rows are exactly -inf; the others agree to float32 rounding of the scores."""
    assert torch.equal(lse == -torch.inf, exact == -torch.inf), case
    if lse.numel():
        gap = torch.where(exact == -torch.inf, 0.0, (lse.double() - exact).abs()).max().item()
        assert gap <= 2e-5, f"{case}: lse off by {gap:.3e}"


def check_counts(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 live: torch.Tensor) -> None:
    """The counting trick: with k = 0 every live key weighs the same, so exp(lse) is their number
    and the output tells how many of them fall into each residue class. One key visited twice, or
    not at all, shows."""
    residue = torch.arange(case.kv_len, device=v.device) % v.shape[3]
    ones = torch.nn.functional.one_hot(residue, v.shape[3]).to(v.dtype).expand_as(v).contiguous()
    out, lse = run(case, q, torch.zeros_like(k), ones)
    number = live.sum(-1)
    assert torch.equal(lse.double().exp().round().long(), number), case
    classes = live.double() @ ones[:1, :1].double()
    seen = out.double() * number[..., None]
    slack = 0.25 + 2 * torch.finfo(case.dtype).eps * classes
    assert ((seen - classes).abs() <= slack).all(), case
