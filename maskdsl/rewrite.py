"""The rewriting engine: rules, and the loop that applies them until nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from maskdsl.expr import And, Mask, Not, Or, join, operands
from maskdsl.settings import debug


@dataclass(frozen=True, slots=True)
class Rule:
    """One law. `apply` gets the operands its types ask for and gives the result, or None.

    kind   Or or And: two operands of it, in either order; Not: the operand
    types  the classes the operands must have
    """

    law: str
    kind: type[Mask]
    types: tuple[type[Mask], ...]
    apply: Callable[..., Mask | None]

    def fire(self, args: Sequence[Mask]) -> Mask | None:
        """The rewritten mask, or None when the rule does not match."""
        if not all(isinstance(a, t) for a, t in zip(args, self.types, strict=True)):
            return None
        return self.apply(*args)


def rewrite_mask(mask: Mask, rules: Sequence[Rule], fired: list[str] | None = None) -> Mask:
    """Apply the rules bottom-up until none fires; every rule makes the mask smaller, so it ends.

    fired  gets the law of every rule that fired, in order
    """
    fired = [] if fired is None else fired
    while True:
        smaller = _rewrite_once(mask, rules, fired)
        if smaller == mask:
            return mask
        mask = smaller


def _rewrite_once(mask: Mask, rules: Sequence[Rule], fired: list[str]) -> Mask:
    below = [_rewrite_once(arg, rules, fired) for arg in operands(mask)]
    if isinstance(mask, Not):
        merged = _first(rules, Not, (below[0],), fired)
        return ~below[0] if merged is None else merged
    if isinstance(mask, (Or, And)):
        kind: Any = type(mask)
        joined = join(kind, tuple(below))
        return _rewrite_pair(joined, rules, fired) if isinstance(joined, kind) else joined
    return mask


def _rewrite_pair(mask: Any, rules: Sequence[Rule], fired: list[str]) -> Mask:
    """Replace the first two operands of an n-ary node that some rule joins."""
    for i, a in enumerate(mask.args):
        for j, b in enumerate(mask.args):
            if i == j:
                continue
            merged = _first(rules, type(mask), (a, b), fired)
            if merged is not None:
                rest = [x for n, x in enumerate(mask.args) if n not in (i, j)]
                return join(type(mask), (merged, *rest))
    result: Mask = mask
    return result


def _first(rules: Sequence[Rule], kind: type[Mask], args: tuple[Mask, ...],
           fired: list[str]) -> Mask | None:
    for rule in rules:
        if rule.kind is kind and len(rule.types) == len(args):
            result = rule.fire(args)
            if result is not None:
                fired.append(rule.law)
                debug(3, f"rewrite {rule.law}: {args} --> {result!r}")
                return result
    return None
