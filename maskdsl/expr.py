"""Mask expressions: immutable values with `|`, `&`, `~` and `-`.

A mask is a set of (p, k) pairs, p an absolute query position and k a key index. Operators build
the normal form at once: n-ary, flat, sorted by a structural key, without duplicates or double
negation. So two ways of writing the same operands give equal values, one hash and one kernel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from maskdsl.errors import AmbiguousTruthError, MaskTypeError, SerializationError

Bool = Any  # bool, numpy or torch bool array, or a traced condition: whatever the indices are
Index = Any  # int, integer array or tensor, or a traced integer


class Place(Protocol):
    """What a mask may ask besides p and k; a `Site` also has batch and head."""

    @property
    def q_len(self) -> Any: ...
    @property
    def kv_len(self) -> Any: ...
    @property
    def total_len(self) -> Any: ...

    def member(self, atom: Any, p: Index, k: Index) -> Bool:
        """Whether the call-time data of a slot atom lists the pair."""

    def read(self, atom: Any, name: str, p: Index) -> Index:
        """A number from the call-time data of a slot atom, for every position."""


class Mask:
    """A set of (p, k) pairs. Build one from atoms and the operators `|`, `&`, `~`, `-`."""

    __slots__ = ()

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        """Whether query position p may see key k, elementwise.

        Written with + - * // % < <= & | ^ alone, so that ints, numpy, torch and the compiler's
        tracer all run this one definition.
        """
        raise NotImplementedError

    def __or__(self, other: Mask) -> Mask:
        return join(Or, (self, _need_mask(self, "|", other)))

    def __and__(self, other: Mask) -> Mask:
        return join(And, (self, _need_mask(self, "&", other)))

    def __invert__(self) -> Mask:
        return self.operand if isinstance(self, Not) else Not(self)

    def __sub__(self, other: Mask) -> Mask:
        """`a - b` is `a & ~b`."""
        return self & ~_need_mask(self, "-", other)

    def __bool__(self) -> bool:
        raise AmbiguousTruthError(
            f"a mask as a truth value: bool({self!r})",
            "`and`, `or`, `not` and `if` ask one yes or no of a mask, which is a set of pairs; "
            "Python would silently drop an operand",
            "`|` for or, `&` for and, `~` for not; `a == b` compares two masks")

    def __repr__(self) -> str:
        """Python that makes an equal mask; arguments at their default are left out at the end."""
        given = [(getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        while given and given[-1][0] == given[-1][1]:
            given.pop()
        return f"{type(self).__name__}({', '.join(repr(value) for value, _ in given)})"

    @property
    def key(self) -> str:
        """The structural key operands are sorted by: the repr, but with functions told apart."""
        below = operands(self)
        if below:
            return f"{type(self).__name__}({', '.join(arg.key for arg in below)})"
        return repr(self)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the structure alone: equal in every process, unless the mask
        holds a function (`Where`), which has no identity beyond its process."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:16]

    def below(self) -> tuple[Mask, ...]:
        """The masks directly below this one."""
        return ()

    def limit(self) -> int | None:
        """The longest length (in tokens) this mask is defined for; None when there is no limit."""
        return None

    def walk(self) -> Iterator[Mask]:
        """This node, then everything below it, operands in order."""
        yield self
        for child in operands(self):
            yield from child.walk()

    def to_json(self) -> str:
        """A JSON text; `from_json` gives an equal mask back."""
        return json.dumps(_to_data(self), sort_keys=True)

    def picture(self, q_len: int, kv_len: int | None = None) -> str:
        """The mask drawn with `#` for a live pair and `·` for a dead one, one line a query row."""
        from maskdsl.show import draw_text  # show imports this module

        return draw_text(self, q_len, kv_len)

    def show(self, q_len: int | None = None, kv_len: int | None = None, **options: Any) -> None:
        """Print the mask as a terminal can show it, at any length; options as in
        `maskdsl.show.draw_terminal`: head, slots, width, colour and more."""
        from maskdsl.show import draw_terminal

        print(draw_terminal(self, q_len, kv_len, **options))

    def plot(self, q_len: int | None = None, kv_len: int | None = None, **options: Any) -> Any:
        """A matplotlib figure of the mask, at any length; options as in
        `maskdsl.plot.plot_mask`: by="source", "token" or "tile", rows, keys, slots, path and
        more."""
        from maskdsl.plot import plot_mask

        return plot_mask(self, q_len, kv_len, **options)

    def to_html(self, path: Any = None, q_len: int | None = None, kv_len: int | None = None,
                **options: Any) -> str:
        """One HTML file, zoomable from the whole matrix to single pairs; options as in
        `maskdsl.page.write_page`. Returns the text, and writes it where a path is given."""
        from maskdsl.page import write_page

        return write_page(self, path, q_len, kv_len, **options)

    def mask_mod(self, q_len: int | None = None, kv_len: int | None = None, **options: Any) -> Any:
        """This set as a FlexAttention `mask_mod(b, h, q_idx, kv_idx)`, as it stands: nothing is
        made causal. Picklable, for any expression.

        q_len, kv_len  needed by masks that ask how long the call is (`LastQ`, slots); kv_len
                       defaults to q_len
        options        q_offset, total_len: as in a call; heads: query heads of the call; slots:
                       the data of every slot, by name
        """
        return EXPORTS["mask_mod"](self, q_len, kv_len, **options)

    def block_mask(self, q_len: int, kv_len: int | None = None, **options: Any) -> Any:
        """This set as a FlexAttention `BlockMask`, as it stands, built without evaluating pairs.

        q_len, kv_len  tokens; kv_len defaults to q_len
        options        batch, heads, device, compute_q_blocks, BLOCK_SIZE (128, or a pair (query
                       rows, keys); FlashAttention 4 on Blackwell wants (256, 128)); q_offset,
                       total_len, slots as for `mask_mod`
        """
        return EXPORTS["block_mask"](self, q_len, kv_len, **options)


def _need_mask(left: Mask, operator: str, right: object) -> Mask:
    if not isinstance(right, Mask):
        raise MaskTypeError(f"{left!r} {operator} {right!r}",
                            f"{right!r}, of type {type(right).__name__}, is not a mask",
                            "an atom such as Sink(4), or Where(fn) for a function")
    return right


@dataclass(frozen=True, slots=True)
class Or(Mask):
    """The pairs in at least one operand."""

    args: tuple[Mask, ...]

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        result = self.args[0].contains(p, k, at)
        for arg in self.args[1:]:
            result = result | arg.contains(p, k, at)
        return result

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.args))

    def below(self) -> tuple[Mask, ...]:
        return self.args


@dataclass(frozen=True, slots=True)
class And(Mask):
    """The pairs in every operand."""

    args: tuple[Mask, ...]

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        result = self.args[0].contains(p, k, at)
        for arg in self.args[1:]:
            result = result & arg.contains(p, k, at)
        return result

    def __repr__(self) -> str:
        return " & ".join(f"({a!r})" if isinstance(a, Or) else repr(a) for a in self.args)

    def below(self) -> tuple[Mask, ...]:
        return self.args


@dataclass(frozen=True, slots=True)
class Not(Mask):
    """The pairs that are not in the operand."""

    operand: Mask

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        # `^ True`, not `~`: on a Python bool, ~True is the integer -2.
        return self.operand.contains(p, k, at) ^ True

    def __repr__(self) -> str:
        inner = repr(self.operand)
        return f"~({inner})" if isinstance(self.operand, (Or, And)) else f"~{inner}"

    def below(self) -> tuple[Mask, ...]:
        return (self.operand,)


Nary = TypeVar("Nary", Or, And)


def join(kind: type[Nary], args: tuple[Mask, ...]) -> Mask:
    """The normal form of `kind` over `args`: (a | b) | a  -->  a | b, sorted."""
    flat: list[Mask] = []
    for arg in args:
        flat.extend(arg.args if isinstance(arg, kind) else (arg,))
    unique = sorted(set(flat), key=lambda mask: mask.key)
    return unique[0] if len(unique) == 1 else kind(tuple(unique))


def operands(mask: Mask) -> tuple[Mask, ...]:
    """The masks directly below `mask`."""
    return mask.below()


# --- text ------------------------------------------------------------------------------------

ATOMS: dict[str, type[Mask]] = {}  # every atom by name; `atom` fills it
EXPORTS: dict[str, Callable[..., Any]] = {}  # what `maskdsl.flex` makes of a mask: it lies above

Atom = TypeVar("Atom", bound=Mask)


def atom(cls: type[Atom]) -> type[Atom]:
    """Register an atom so that JSON can name it."""
    ATOMS[cls.__name__] = cls
    return cls


def _to_data(mask: Mask) -> Any:
    if isinstance(mask, (Or, And)):
        return {type(mask).__name__: [_to_data(a) for a in mask.args]}
    if isinstance(mask, Not):
        return {"Not": _to_data(mask.operand)}
    values = [getattr(mask, f.name) for f in fields(mask)]  # type: ignore[arg-type]
    if mask.below():  # PerHead, whose one field is its masks
        return {type(mask).__name__: [{"masks": [_to_data(below) for below in mask.below()]}]}
    for value in values:
        if callable(value):
            raise SerializationError(f"{mask!r}.to_json()", "a Python function has no JSON form",
                                     "atoms and operators, or pickle with a module-level function")
    return {type(mask).__name__: values}


def from_json(text: str) -> Mask:
    """The mask that `Mask.to_json` wrote; SerializationError on anything else."""
    try:
        return _from_data(json.loads(text))
    except SerializationError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise SerializationError(f"from_json({text[:60]!r})", f"not a mask: {error}",
                                 "a text written by mask.to_json()") from error


def _from_data(data: Any) -> Mask:
    ((name, value),) = data.items()
    if name == "Not":
        return ~_from_data(value)
    if name in ("Or", "And"):
        first, second, *more = map(_from_data, value)
        args = (first, second, *more)
        return join(Or, args) if name == "Or" else join(And, args)
    return ATOMS[name](*map(_from_value, value))


def _from_value(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(map(_from_data, value["masks"]))
    return tuple(value) if isinstance(value, list) else value
