"""Check the gradients of a compiled mask against dense autograd in float64."""

from __future__ import annotations

import torch
from oracle import Case, check_close, make_inputs, run
from rounding_oracle import check_rounding
from score_oracle import modified_attention, modified_scores

from maskdsl import SinkLogits, dense

Tensor = torch.Tensor


def loss_of(out: Tensor, lse: Tensor | None, weights: tuple[Tensor, Tensor]) -> Tensor:
    """A scalar that weighs every output, and every finite lse, differently."""
    loss = (out * weights[0].to(out.dtype)).sum()
    if lse is None:
        return loss
    return loss + torch.where(lse == -torch.inf, 0.0, lse * weights[1].to(lse.dtype)).sum()


def dense_gradients(case: Case, tensors: tuple[Tensor, ...], live: Tensor,
                    weights: tuple[Tensor, Tensor], with_lse: bool) -> tuple[Tensor, ...]:
    """dq, dk, dv and the gradients of the modifiers' data, of dense attention in q's dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    data = dict(zip(case.data, leaves[3:], strict=True))
    out, lse = modified_attention(*leaves[:3], live, case.scores, data, case.shape, case.scale)
    loss = loss_of(out, lse if with_lse else None, weights)
    return torch.autograd.grad(loss, leaves)


def check_gradients(case: Case, device: str = "cpu", with_lse: bool = True) -> None:
    """All gradients within FlashAttention's rule, those of the interpreted kernels also element by
    element; exact zeros where no pair is live."""
    tensors = (*make_inputs(case, device), *(t.to(device) for t in case.data.values()))
    live = dense(case.whole, case.shape, case.batch, case.heads, device, case.slots)
    generator = torch.Generator(device=device).manual_seed(7)
    size = (case.batch, case.heads, case.q_len)
    weights = (torch.randn(*size, tensors[2].shape[3], generator=generator, device=device),
               torch.randn(size, generator=generator, device=device))
    # exactly the weights the half precision losses see
    weights = (weights[0].to(case.dtype).float(), weights[1])
    wide = tuple(t.double() for t in tensors)
    exact = dense_gradients(case, wide, live, weights, with_lse)
    plain = dense_gradients(case, tensors, live, weights, with_lse)
    kept = rounding_of_kept(case, wide, live, weights, with_lse)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = run(case, *leaves[:3], **dict(zip(case.data, leaves[3:], strict=True)))
    found = torch.autograd.grad(loss_of(out, lse if with_lse else None, weights), leaves)
    for t, ours, right, theirs, off in zip(tensors, found, exact, plain, kept, strict=True):
        assert ours.shape == t.shape and ours.dtype == t.dtype
        assert torch.isfinite(ours).all(), case
        worse = ours.numel() and off.abs().max() > (theirs.double() - right).abs().max()
        check_close(ours, right, right + off if worse else theirs, case)
    check_dead(case, found, live)
    if not case.scores and device == "cpu" and case.options.get("backend") == "triton":
        check_rounding(case, tensors, (out, lse), found, live,
                       (weights[0], weights[1] if with_lse else None))


def rounding_of_kept(case: Case, tensors: tuple[Tensor, ...], live: Tensor,
                     weights: tuple[Tensor, Tensor], with_lse: bool) -> list[Tensor]:
    """What changes in each gradient, all else exact, when only the output, rounded to the case's
    dtype, and the lse, rounded to float32, are kept from the forward pass.

    The rule compares with plain PyTorch, which keeps all probabilities. With less memory delta =
    rowsum(dO * O) is off by the output's rounding (and its sum's), and P = exp(s - lse) by the
    lse's: FlashAttention has both errors, as we do. The first shows where P (dP - delta) cancels
    throughout, as with one live key a row, whose gradient is 0 and for which PyTorch subtracts
    equal numbers; the second in float32 with large scores.
    """
    leaves = [t.clone().requires_grad_() for t in tensors]
    data = dict(zip(case.data, leaves[3:], strict=True))
    q, k, v = leaves[:3]
    weight, eps = weights[0].double(), torch.finfo(torch.float32).eps
    scores = modified_scores(q, k, live, case.scores, data, case.shape, case.scale)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    with torch.no_grad():
        out, lse = modified_attention(q, k, v, live, case.scores, data, case.shape, case.scale)
        off = ((out.to(case.dtype).double() - out) * weight).sum(-1)
        off += 2 * eps * (out * weight).abs().sum(-1)
        safe = lse.masked_fill(lse == -torch.inf, 0.0)
        chance = torch.exp(scores - safe[..., None])
        more = 2 * eps * (1 + safe.abs())[..., None] * chance  # of each probability
        delta = (out * weight).sum(-1) - (weights[1].double() if with_lse else 0.0)
        change = more * (weight @ values.mT - delta[..., None]) - chance * off[..., None]
    loss = (torch.where(scores == -torch.inf, 0.0, scores) * change).sum()
    loss = loss + (more @ values * weight).sum()
    for mod in case.scores:
        if isinstance(mod, SinkLogits):
            sinks = data[mod.name]
            loss = loss - (sinks[:, None] * torch.exp(sinks.detach()[:, None] - safe) * off).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g
            for t, g in zip(leaves, found, strict=True)]


def check_dead(case: Case, found: tuple[Tensor, ...], live: Tensor) -> None:
    """Rows and keys without a live pair have gradients of exactly 0."""
    live = live.expand(case.batch, case.heads, case.q_len, case.kv_len)
    assert (found[0][~live.any(-1)] == 0).all(), case
    seen = live.any(-2).unflatten(1, (case.kv_heads, -1)).any(2)
    assert (found[1][~seen] == 0).all() and (found[2][~seen] == 0).all(), case
