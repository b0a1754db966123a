"""`Where`: any FlexAttention-style function as a mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maskdsl.errors import AtomArgumentError, TraceError
from maskdsl.expr import Bool, Index, Mask, Place

MaskMod = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True, slots=True, repr=False)
class Where(Mask):
    """Any FlexAttention-style `mask_mod(b, h, q_idx, kv_idx) -> bool`.

    q_idx is the absolute position p (equal to FlexAttention's for square calls). The function is
    traced once: what it does with + - * // % comparisons & | ^ ~ and torch.where / minimum /
    maximum / abs / logical_* becomes geometry and kernel text like any atom's, so a window written
    as a lambda skips the same tiles as `Window`. A function that cannot be traced (it reads a
    tensor, say) still runs on the torch backend; the Triton backend raises TraceError.

    >>> print(Where(lambda b, h, q, k: q - k == 1).picture(3))
    ···
    #··
    ·#·
    """

    fn: MaskMod

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise AtomArgumentError(f"Where({self.fn!r})", "not a function",
                                    "Where(lambda b, h, q, k: q >= k)")
        try:
            inspect.signature(self.fn).bind(0, 0, 0, 0)
        except TypeError as error:
            raise AtomArgumentError(f"Where({self.fn!r})",
                                    f"it cannot be called with (b, h, q, k): {error}",
                                    "Where(lambda b, h, q, k: q >= k)") from error
        except ValueError:  # a builtin without a signature: let the call tell
            pass

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        b, h = getattr(at, "batch", 0), getattr(at, "head", 0)
        if hasattr(p, "new_tensor"):  # functions ask a tensor's methods of all four
            b, h = (p.new_tensor(x) if isinstance(x, int) else x for x in (b, h))
        try:
            return self.fn(b, h, p, k)
        except RuntimeError as error:
            if "Boolean value of Tensor" not in str(error):
                raise
            raise TraceError(f"`and`, `or`, `not`, `if` or a chained comparison in {self!r}",
                             "Python asks for one truth value where there is one for each pair",
                             "`&`, `|`, `~` and torch.where") from error

    def __repr__(self) -> str:
        fn = self.fn
        return f"Where({getattr(fn, '__qualname__', type(fn).__name__)})"

    @property
    def key(self) -> str:
        """Unlike an atom's, tied to this very function: two lambdas may share a name."""
        return f"{self!r}@{id(self.fn):x}"
