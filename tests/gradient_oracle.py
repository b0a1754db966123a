"""Check the gradients of a compiled mask against dense autograd in float64."""

from __future__ import annotations

import torch
from oracle import Case, check_close, make_inputs, run

from maskdsl import dense, dense_attention

Tensor = torch.Tensor


def loss_of(out: Tensor, lse: Tensor | None, weights: tuple[Tensor, Tensor]) -> Tensor:
    """A scalar that weighs every output, and every finite lse, differently."""
    loss = (out * weights[0].to(out.dtype)).sum()
    if lse is None:
        return loss
    return loss + torch.where(lse == -torch.inf, 0.0, lse * weights[1].to(lse.dtype)).sum()


def dense_gradients(case: Case, tensors: tuple[Tensor, ...], live: Tensor,
                    weights: tuple[Tensor, Tensor], with_lse: bool) -> tuple[Tensor, ...]:
    """dq, dk, dv of dense attention in the tensors' own dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = dense_attention(*leaves, live, case.scale)
    loss = loss_of(out, lse if with_lse else None, weights)
    return torch.autograd.grad(loss, leaves)


def check_gradients(case: Case, device: str = "cpu", with_lse: bool = True) -> None:
    """dq, dk, dv within twice PyTorch's own error; exact zeros where no pair is live."""
    tensors = make_inputs(case, device)
    live = dense(case.whole, case.shape, case.batch, case.heads, device, case.slots)
    generator = torch.Generator(device=device).manual_seed(7)
    size = (case.batch, case.heads, case.q_len)
    weights = (torch.randn(*size, tensors[2].shape[3], generator=generator, device=device),
               torch.randn(size, generator=generator, device=device))
    # exactly the weights the half precision losses see
    weights = (weights[0].to(case.dtype).float(), weights[1])
    exact = dense_gradients(case, tuple(t.double() for t in tensors), live, weights, with_lse)
    plain = dense_gradients(case, tensors, live, weights, with_lse)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = run(case, *leaves)
    found = torch.autograd.grad(loss_of(out, lse if with_lse else None, weights), leaves)
    room = delta_rounding(case, tensors, live, weights[0])
    for t, ours, right, theirs, least in zip(tensors, found, exact, plain, room, strict=True):
        assert ours.shape == t.shape and ours.dtype == t.dtype
        assert torch.isfinite(ours).all(), case
        if ours.numel() and (ours.double() - right).abs().max() > least:
            check_close(ours, right, theirs, case)
    check_dead(case, found, live)


def delta_rounding(case: Case, tensors: tuple[Tensor, ...], live: Tensor,
                   weight: Tensor) -> tuple[float, float, float]:
    """What rounding the output does to dq and dk: delta = rowsum(dO * O) is off by up to one unit
    of the last place of each product. It shows where P (dP - delta) cancels: a row with one live
    key has a gradient of exactly 0, and plain PyTorch, which subtracts equal numbers, finds it."""
    q, k, v = (t.double() for t in tensors)
    out, lse = dense_attention(q, k, v, live, case.scale)
    k = k.repeat_interleave(case.heads // case.kv_heads, 1)
    scale = case.dim ** -0.5 if case.scale is None else case.scale
    scores = (q @ k.mT * scale).masked_fill(~live, -torch.inf)
    chance = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    off = torch.finfo(case.dtype).eps * scale * chance * (out * weight).abs().sum(-1)[..., None]
    if not off.numel():
        return 0.0, 0.0, 0.0
    dk = (off.mT @ q.abs()).unflatten(1, (case.kv_heads, -1)).sum(2)
    return (off @ k.abs()).max().item(), dk.max().item(), 0.0


def check_dead(case: Case, found: tuple[Tensor, ...], live: Tensor) -> None:
    """Rows and keys without a live pair have gradients of exactly 0."""
    live = live.expand(case.batch, case.heads, case.q_len, case.kv_len)
    assert (found[0][~live.any(-1)] == 0).all(), case
    seen = live.any(-2).unflatten(1, (case.kv_heads, -1)).any(2)
    assert (found[1][~seen] == 0).all() and (found[2][~seen] == 0).all(), case
