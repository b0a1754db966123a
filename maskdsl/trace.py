"""Run a mask's `contains` on symbols and keep what it computed.

Integers are sympy expressions; conditions are a tree of `Ge` leaves under `All` and `Any`, where
`Ge(e)` means e >= 0. Over the integers a negated comparison is a comparison again, so there is no
"not" in the tree: ~(e >= 0)  -->  -e - 1 >= 0.

sympy does the integer part only. Its booleans are unfit here: `==` is structural, and
simplify_logic makes masks longer, not shorter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

from maskdsl.errors import TraceError
from maskdsl.expr import Mask

P = sympy.Symbol("p", integer=True)  # negative when there are more queries than keys
K = sympy.Symbol("k", integer=True, nonnegative=True)
BATCH, HEAD, Q_LEN, KV_LEN, TOTAL_LEN = sympy.symbols(
    "batch head q_len kv_len total_len", integer=True, nonnegative=True)


MAX_CONSTANT = 1 << 30


class Lookup(sympy.Function):  # type: ignore[misc]
    """A number read from call-time data at a position, never falling as the position grows."""

    is_integer = True
    is_nonnegative = True


@dataclass(frozen=True, slots=True)
class Ge:
    """The condition `value >= 0`."""

    value: sympy.Expr


@dataclass(frozen=True, slots=True)
class Has:
    """The condition that the data of a slot lists the pair; `held` False: that it does not."""

    atom: Any
    held: bool = True


@dataclass(frozen=True, slots=True)
class All:
    """Every condition holds; true when there is none."""

    args: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Any_:
    """At least one condition holds; false when there is none."""

    args: tuple[Condition, ...]


Condition: TypeAlias = Ge | Has | All | Any_
TRUE, FALSE = All(()), Any_(())


def conjoin(*args: Condition) -> Condition:
    """All of `args`, flat, with constants folded."""
    flat: list[Condition] = []
    for arg in args:
        if arg == FALSE:
            return FALSE
        flat.extend(arg.args if isinstance(arg, All) else (arg,))
    unique = tuple(dict.fromkeys(flat))
    return unique[0] if len(unique) == 1 else All(unique)


def disjoin(*args: Condition) -> Condition:
    """Any of `args`, flat, with constants folded."""
    flat: list[Condition] = []
    for arg in args:
        if arg == TRUE:
            return TRUE
        flat.extend(arg.args if isinstance(arg, Any_) else (arg,))
    unique = tuple(dict.fromkeys(flat))
    return unique[0] if len(unique) == 1 else Any_(unique)


def negate(condition: Condition) -> Condition:
    """The opposite condition: De Morgan down to the leaves."""
    if isinstance(condition, Ge):
        return at_least_zero(-condition.value - 1)
    if isinstance(condition, Has):
        return Has(condition.atom, not condition.held)
    parts = [negate(arg) for arg in condition.args]
    return disjoin(*parts) if isinstance(condition, All) else conjoin(*parts)


def at_least_zero(value: sympy.Expr) -> Condition:
    """`value >= 0`; numbers are folded, and a Max or Min becomes a condition on its arguments.

    9 - Max(p - k, k - p) >= 0  -->  9 - (p - k) >= 0 and 9 - (k - p) >= 0
    """
    if value.is_nonnegative:
        return TRUE
    if value.is_negative:
        return FALSE
    for term in sympy.Add.make_args(value):
        scale, extreme = term.as_coeff_Mul()
        if extreme.func in (sympy.Max, sympy.Min):
            parts = [at_least_zero(value - term + scale * arg) for arg in extreme.args]
            one_is_enough = (extreme.func == sympy.Max) == (scale > 0)
            return disjoin(*parts) if one_is_enough else conjoin(*parts)
    return Ge(value)


class _Traced:
    """What integers and conditions have in common: torch functions, and no truth value."""

    __slots__ = ()

    def __bool__(self) -> bool:
        raise TraceError("`and`, `or`, `not`, `if` or a chained comparison in a mask_mod",
                         "Python asks for one truth value where there is one for each pair",
                         "`&`, `|`, `~` and torch.where")

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        rule = TORCH_RULES.get(getattr(func, "__name__", ""))
        if rule is None:
            raise TraceError(f"{getattr(func, '__name__', func)} in a mask_mod",
                             "this operation cannot be compiled into a kernel",
                             "+ - * // % comparisons, & | ^ ~, torch.where, minimum, maximum, abs; "
                             "or backend='torch', which runs any function")
        return rule(*args, **(kwargs or {}))  # a TypeError is told by `trace`


class TracedBool(_Traced):
    """A condition on p and k."""

    __slots__ = ("condition",)

    def __init__(self, condition: Condition) -> None:
        self.condition = condition

    def __and__(self, other: Any) -> TracedBool:
        return TracedBool(conjoin(self.condition, condition_of(other)))

    def __or__(self, other: Any) -> TracedBool:
        return TracedBool(disjoin(self.condition, condition_of(other)))

    device = None  # for functions of transformers: mask(...).to(result.device)

    def to(self, *where: Any) -> TracedBool:
        """Itself."""
        return self

    def __xor__(self, other: Any) -> TracedBool:
        a, b = self.condition, condition_of(other)
        return TracedBool(disjoin(conjoin(a, negate(b)), conjoin(negate(a), b)))

    def __invert__(self) -> TracedBool:
        return TracedBool(negate(self.condition))

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__
    __mul__, __add__ = __and__, __or__  # as torch computes with bool tensors
    __rmul__, __radd__ = __and__, __or__

    def __eq__(self, other: object) -> Any:
        return ~(self ^ other)

    def __ne__(self, other: object) -> Any:
        return self ^ other

    __hash__ = None  # type: ignore[assignment]


class TracedInt(_Traced):
    """An integer that depends on p, k and the lengths."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = sympy.sympify(value)

    def __add__(self, other: Any) -> TracedInt:
        return TracedInt(self.value + value_of(other))

    def __sub__(self, other: Any) -> TracedInt:
        return TracedInt(self.value - value_of(other))

    def __rsub__(self, other: Any) -> TracedInt:
        return TracedInt(value_of(other) - self.value)

    def __mul__(self, other: Any) -> TracedInt:
        return TracedInt(sympy.expand(self.value * value_of(other)))

    def __floordiv__(self, other: Any) -> TracedInt:
        return TracedInt(sympy.floor(self.value / _positive(other, "//")))

    def __mod__(self, other: Any) -> TracedInt:
        # Unevaluated: sympy would factor products out of a Mod, and the kernel's text with them.
        return TracedInt(sympy.Mod(self.value, _positive(other, "%"), evaluate=False))

    def __rshift__(self, other: Any) -> TracedInt:
        return self // (1 << operator.index(other))

    def __lshift__(self, other: Any) -> TracedInt:
        return self * (1 << operator.index(other))

    def __neg__(self) -> TracedInt:
        return TracedInt(-self.value)

    def __abs__(self) -> TracedInt:
        return TracedInt(sympy.Max(self.value, -self.value))

    abs = __abs__

    def clamp(self, min: Any = None, max: Any = None) -> TracedInt:
        """The value, no less than `min` and no more than `max`, as a tensor's method."""
        low = self.value if min is None else sympy.Max(self.value, value_of(min))
        return TracedInt(low if max is None else sympy.Min(low, value_of(max)))

    device = None  # noop_mask asks for it, and hands it to new_ones

    def new_ones(self, *size: Any, **options: Any) -> TracedBool:
        """True: how FlexAttention's and_masks and noop_mask start."""
        return TracedBool(TRUE)

    def new_zeros(self, *size: Any, **options: Any) -> TracedBool:
        """False: how FlexAttention's or_masks starts."""
        return TracedBool(FALSE)

    __radd__, __rmul__ = __add__, __mul__

    def __ge__(self, other: Any) -> TracedBool:
        return TracedBool(at_least_zero(self.value - value_of(other)))

    def __le__(self, other: Any) -> TracedBool:
        return TracedBool(at_least_zero(value_of(other) - self.value))

    def __gt__(self, other: Any) -> TracedBool:
        return TracedBool(at_least_zero(self.value - value_of(other) - 1))

    def __lt__(self, other: Any) -> TracedBool:
        return TracedBool(at_least_zero(value_of(other) - self.value - 1))

    def __eq__(self, other: object) -> Any:
        return (self >= other) & (self <= other)

    def __ne__(self, other: object) -> Any:
        return (self > other) | (self < other)

    __hash__ = None  # type: ignore[assignment]


def value_of(x: Any) -> sympy.Expr:
    """The sympy integer behind an int or a traced integer."""
    if isinstance(x, TracedInt):
        return x.value
    if hasattr(x, "__index__") and not isinstance(x, bool) and getattr(x, "ndim", 0) == 0:
        number = x.__index__()
        if abs(number) > MAX_CONSTANT:
            raise TraceError(f"the constant {number} in a mask_mod", "kernels count in 32 bits",
                             f"constants up to {MAX_CONSTANT}")
        return sympy.Integer(number)
    raise TraceError(f"{type(x).__name__} in arithmetic with an index",
                     "only integers and the four indices can be compiled",
                     "an integer constant; or backend='torch', which runs any function")


def condition_of(x: Any) -> Condition:
    """The condition behind a bool or a traced condition."""
    if isinstance(x, TracedBool):
        return x.condition
    if isinstance(x, bool) or type(x).__name__ in ("bool", "bool_") or \
            (str(getattr(x, "dtype", "")) == "torch.bool" and x.ndim == 0):
        return TRUE if x else FALSE
    raise TraceError(f"a mask_mod that gives {type(x).__name__}",
                     "a mask is a condition on (b, h, q, k)", "lambda b, h, q, k: q >= k")


def _positive(divisor: Any, sign: str) -> sympy.Expr:
    value = value_of(divisor)
    if value.is_Integer and value <= 0:
        raise TraceError(f"{sign} {value} in a mask_mod", "the divisor must be positive",
                         f"{sign} with a positive divisor")
    return value


def _select(test: Any, yes: Any, no: Any) -> Any:
    c = condition_of(test)
    if isinstance(yes, (TracedBool, bool)) or isinstance(no, (TracedBool, bool)):
        return TracedBool(disjoin(conjoin(c, condition_of(yes)),
                                  conjoin(negate(c), condition_of(no))))
    raise TraceError("torch.where between integers in a mask_mod", "cannot be compiled",
                     "torch.where between two conditions")


def _divide(a: Any, b: Any, rounding_mode: str | None = None) -> TracedInt:
    if rounding_mode != "floor":
        raise TraceError(f"torch.div with rounding_mode={rounding_mode!r} in a mask_mod",
                         "only whole numbers can be compiled", "rounding_mode='floor', or //")
    return TracedInt(value_of(a)).__floordiv__(b)


def _all_alike(value: Condition) -> Callable[..., TracedBool]:
    def alike(x: Any, dtype: Any = None, **options: Any) -> TracedBool:
        if str(dtype) != "torch.bool":
            raise TraceError(f"a constant of type {dtype} in a mask_mod", "a mask is a condition",
                             "dtype=torch.bool")
        return TracedBool(value)
    return alike


TORCH_RULES: dict[str, Callable[..., Any]] = {
    "where": _select,
    "logical_and": lambda a, b: TracedBool(condition_of(a)) & b,
    "logical_or": lambda a, b: TracedBool(condition_of(a)) | b,
    "logical_xor": lambda a, b: TracedBool(condition_of(a)) ^ b,
    "logical_not": lambda a: ~TracedBool(condition_of(a)),
    "minimum": lambda a, b: TracedInt(sympy.Min(value_of(a), value_of(b))),
    "maximum": lambda a, b: TracedInt(sympy.Max(value_of(a), value_of(b))),
    "abs": lambda a: abs(TracedInt(value_of(a))),
    "clamp": lambda a, min=None, max=None: TracedInt(value_of(a)).clamp(min, max),
    "floor_divide": lambda a, b: TracedInt(value_of(a)) // b,
    "div": _divide,
    "ones_like": _all_alike(TRUE),
    "zeros_like": _all_alike(FALSE),
    "__and__": lambda a, b: TracedBool(condition_of(a)) & b,
    "__or__": lambda a, b: TracedBool(condition_of(a)) | b,
    "__xor__": lambda a, b: TracedBool(condition_of(a)) ^ b,
    "eq": lambda a, b: TracedInt(value_of(a)) == b,
    "ne": lambda a, b: TracedInt(value_of(a)) != b,
    "lt": lambda a, b: TracedInt(value_of(a)) < b,
    "le": lambda a, b: TracedInt(value_of(a)) <= b,
    "gt": lambda a, b: TracedInt(value_of(a)) > b,
    "ge": lambda a, b: TracedInt(value_of(a)) >= b,
}


@dataclass(frozen=True, slots=True)
class SymbolicPlace:
    """The `Place` a mask is traced at: every length a symbol."""

    q_len: TracedInt
    kv_len: TracedInt
    total_len: TracedInt
    batch: TracedInt
    head: TracedInt

    def member(self, atom: Any, p: Any, k: Any) -> TracedBool:
        """Only the data can tell: a leaf of the condition."""
        return TracedBool(Has(atom))

    def read(self, atom: Any, name: str, p: TracedInt) -> TracedInt:
        """A prefix has one length; a document's ends never fall as p grows."""
        symbol = sympy.Symbol(f"slot_{atom.slot}_{name}", integer=True, nonnegative=True)
        return TracedInt(symbol if name == "length" else Lookup(symbol, p.value))


PLACE = SymbolicPlace(*map(TracedInt, (Q_LEN, KV_LEN, TOTAL_LEN, BATCH, HEAD)))


def trace(mask: Mask) -> Condition:
    """The condition `mask.contains(p, k)` as a tree; TraceError if it cannot be told."""
    try:
        result = mask.contains(TracedInt(P), TracedInt(K), PLACE)
    except (TypeError, AttributeError, RuntimeError, IndexError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(repr(mask), f"its function cannot be run on symbols: {error}",
                         "+ - * // % comparisons and & | ^ ~ on the four indices; or "
                         "backend='torch', which runs any function") from error
    return condition_of(result)


def is_traceable(mask: Mask) -> bool:
    """Whether the mask can be compiled into a kernel."""
    try:
        trace(mask)
    except TraceError:
        return False
    return True


def all_leaves(condition: Condition) -> Iterator[Ge | Has]:
    """The comparisons and the lists that a condition asks."""
    if isinstance(condition, Ge | Has):
        yield condition
    else:
        for arg in condition.args:
            yield from all_leaves(arg)
