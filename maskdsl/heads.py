"""`PerHead`: another mask for every query head, in one launch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from maskdsl.errors import AtomArgumentError, HeadCountError
from maskdsl.expr import And, Bool, Index, Mask, Not, Or, Place, atom, join

EXAMPLE = "PerHead([Window(512), Causal(), Window(512), Causal()])"


@atom
@dataclass(frozen=True, slots=True)
class PerHead(Mask):
    """{(p, k) : masks[head] keeps (p, k)}, one mask for every query head.

    masks  a list of as many masks as the call has query heads. They may hold slots, and PerHead is
           an operand like any other: `PerHead([...]) | Sink(4)`.

    Equal masks share one body of the kernel, and heads with costly masks start first. Source:
    DuoAttention, arXiv 2410.10819 (retrieval and streaming heads); MInference, arXiv 2407.02490.
    """

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        masks = tuple(self.masks) if isinstance(self.masks, Iterable) else ()
        if not masks or not all(isinstance(mask, Mask) for mask in masks):
            raise AtomArgumentError(f"PerHead({self.masks!r})", "a list of masks is needed, one "
                                    "for every query head", EXAMPLE)
        if any(isinstance(node, PerHead) for mask in masks for node in mask.walk()):
            raise AtomArgumentError("PerHead inside PerHead", "one mask is chosen by head once",
                                    EXAMPLE)
        object.__setattr__(self, "masks", masks)

    def __repr__(self) -> str:
        return f"PerHead([{', '.join(map(repr, self.masks))}])"

    def below(self) -> tuple[Mask, ...]:
        return self.masks

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        head = at.head  # type: ignore[attr-defined]
        result: Bool = None
        for i, mask in enumerate(self.masks):
            mine = (head >= i) & (head <= i) & mask.contains(p, k, at)
            result = mine if result is None else result | mine
        return result


def count_heads(mask: Mask) -> int | None:
    """The number of query heads the mask is for; None when it is the same for all."""
    counts = {len(node.masks) for node in mask.walk() if isinstance(node, PerHead)}
    if len(counts) > 1:
        raise HeadCountError(repr(mask), f"one mask for {' and for '.join(map(str, counts))} heads",
                             "PerHead lists of one length")
    return counts.pop() if counts else None


def pick_head(mask: Mask, head: int) -> Mask:
    """The mask of one query head, without PerHead."""
    if isinstance(mask, PerHead):
        return mask.masks[head]
    if isinstance(mask, Not):
        return ~pick_head(mask.operand, head)
    if isinstance(mask, (Or, And)):
        args = tuple(pick_head(arg, head) for arg in mask.args)
        return join(Or, args) if isinstance(mask, Or) else join(And, args)
    return mask
