"""Traced integers and conditions as program text.

One spelling serves two readers: in a kernel `tl` is Triton's language; on the host the same text
runs on numpy arrays with `NUMPY_NAMES`, so the tests and `explain()` execute what the GPU does.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import sympy

from maskdsl.trace import FALSE, TRUE, All, Condition, Ge, Has, Lookup

NUMPY_NAMES: dict[str, Any] = {
    "tl": SimpleNamespace(maximum=np.maximum, minimum=np.minimum, where=np.where,
                          cdiv=lambda a, b: -(-a // b)),
    "floor_div": lambda a, b: a // b,
    "modulo": lambda a, b: a % b,
    "lookup": lambda table, p, length: table[np.clip(p, -1, length) + 1],
}


def evaluate(text: str, **values: Any) -> Any:
    """Run one emitted expression on numpy arrays."""
    return eval(text, dict(NUMPY_NAMES), values)


class UnprintableError(Exception):
    """Internal: an integer expression with an operation that has no spelling."""


def write_integer(e: sympy.Expr, names: dict[sympy.Expr, str] | None = None) -> str:
    """An integer expression as text; `names` spells chosen sub-expressions.

    Max(0, p - 3)  -->  'tl.maximum(0, p - 3)';  floor(p/64)  -->  'floor_div(p, 64)'
    """
    names = names or {}
    if e in names:
        return names[e]
    if e.is_Integer:
        return str(e)
    if e.is_Symbol:
        return str(e.name)
    if e.is_Add:
        return _write_sum(e, names)
    if e.is_Mul:
        factors = sorted(e.args, key=lambda a: not a.is_Integer)
        return " * ".join(_wrapped(a, names) for a in factors)
    if e.is_Pow and e.exp.is_Integer and e.exp > 0:
        return " * ".join([_wrapped(e.base, names)] * int(e.exp))
    if e.func in (sympy.Max, sympy.Min):
        return _write_nested(e, names)
    if e.func == sympy.floor:
        over, under = sympy.fraction(sympy.together(e.args[0]))
        return _write_division("//", "floor_div", over, under, names)
    if e.func == Lookup:
        name, place = e.args
        slot = str(name).rsplit("_", 1)[0]
        return f"lookup({name}, {write_integer(place, names)}, {slot}_tokens)"
    if e.func == sympy.Mod:
        over, under = e.args
        return _write_division("%", "modulo", over, under, names)
    raise UnprintableError(f"no spelling for {e}")


def _wrapped(e: sympy.Expr, names: dict[sympy.Expr, str]) -> str:
    text = write_integer(e, names)
    return f"({text})" if (e.is_Add or e.is_Mul or text.startswith("-")) and " " in text else text


def _write_sum(e: sympy.Expr, names: dict[sympy.Expr, str]) -> str:
    """p - 3, not -3 + p: symbols first, then the number, minus as a sign."""
    terms = sorted(e.args, key=lambda t: (t.is_Integer, t.could_extract_minus_sign(), str(t)))
    text = ""
    for term in terms:
        minus = bool(text) and term.could_extract_minus_sign()
        body = _wrapped(-term if minus else term, names)
        text += f" {'-' if minus else '+'} {body}" if text else body
    return text


def _write_nested(e: sympy.Expr, names: dict[sympy.Expr, str]) -> str:
    name = "tl.maximum" if e.func == sympy.Max else "tl.minimum"
    args = sorted((write_integer(a, names) for a in e.args), key=lambda t: (not t.isdigit(), t))
    text = args[-1]
    for arg in reversed(args[:-1]):
        text = f"{name}({arg}, {text})"
    return text


def _write_division(sign: str, helper: str, over: sympy.Expr, under: sympy.Expr,
                    names: dict[sympy.Expr, str]) -> str:
    """Triton's // and % round towards zero; the helper rounds down where the sign is not known."""
    if over.is_nonnegative:
        return f"({_wrapped(over, names)} {sign} {_wrapped(under, names)})"
    return f"{helper}({write_integer(over, names)}, {write_integer(under, names)})"


def compare_text(e: sympy.Expr, names: dict[sympy.Expr, str] | None = None) -> str:
    """`e >= 0` with no minus signs: p - k - 3 >= 0  -->  'p >= k + 3'."""
    terms = sympy.Add.make_args(e)
    left = [t for t in terms if not t.could_extract_minus_sign()]
    right = [-t for t in terms if t.could_extract_minus_sign()]
    return f"{write_integer(sympy.Add(*left), names)} >= {write_integer(sympy.Add(*right), names)}"


def write_condition(c: Condition, names: dict[sympy.Expr, str] | None = None) -> str:
    """A condition as text, comparisons joined with & and |."""
    if c in (TRUE, FALSE):
        raise UnprintableError("a constant condition has no text")
    if isinstance(c, Ge):
        return compare_text(c.value, names)
    if isinstance(c, Has):
        return f"in_{c.atom.slot}" if c.held else f"~in_{c.atom.slot}"
    sign = " & " if isinstance(c, All) else " | "
    return sign.join(f"({write_condition(arg, names)})" for arg in c.args)
