"""The affine atoms: per query, one interval of keys with plain bounds.

One class an atom, and one method each: `contains`. Everything else (geometry, tile classes, the
kernel's mask text) is derived from it. p is the absolute query position, k the key index; pictures
show p = k = 0 at the top left, one row a query.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskdsl.arguments import MAX_SIZE, integer
from maskdsl.errors import AtomArgumentError
from maskdsl.expr import Bool, Index, Mask, Place, atom


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Full(Mask):
    """Every pair: all kv_len keys for every query.

    >>> print(Full().picture(2))
    ##
    ##
    """

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return k >= 0


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Empty(Mask):
    """No pair: every row gives output 0 and lse -inf.

    >>> print(Empty().picture(2))
    ··
    ··
    """

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return k < 0


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Causal(Mask):
    """{(p, k) : k <= p}; p + 1 keys.

    >>> print(Causal().picture(3))
    #··
    ##·
    ###
    """

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return k <= p


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Sink(Mask):
    """{(p, k) : k < n}, the first n keys, "attention sinks"; n keys.

    Source: StreamingLLM, arXiv 2309.17453, section 3.2.

    >>> print(Sink(1).picture(3))
    #··
    #··
    #··
    """

    n: int

    def __post_init__(self) -> None:
        integer(self, "n")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return k < self.n


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Window(Mask):
    """{(p, k) : p - k < left and k - p <= right}; left + right keys.

    `Window(n)` is {(p, k) : 0 <= p - k < n}: n keys *including the query's own*. MInference's code
    counts so; the formula in the TriangleMix paper would keep n + 1, and published FlexAttention
    examples of a "sliding window of n" keep either n or n + 1.

    >>> print(Window(2).picture(4))
    #···
    ##··
    ·##·
    ··##
    >>> print(Window(1, 1).picture(3))
    ##·
    ·##
    ··#
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        integer(self, "left")
        integer(self, "right")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return (p - k < self.left) & (k - p <= self.right)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class LastQ(Mask):
    """{(p, k) : p >= total_len - n}, the last n queries of the prompt; all keys for them.

    In chunked prefill give `total_len` to the call, or every chunk takes itself for the last.
    Source: TriangleMix, arXiv 2507.21526, section 3.

    >>> print(LastQ(1).picture(3))
    ···
    ···
    ###
    """

    n: int

    def __post_init__(self) -> None:
        integer(self, "n")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return p >= at.total_len - self.n


@atom
@dataclass(frozen=True, slots=True, repr=False)
class FirstQ(Mask):
    """{(p, k) : p < n}, the first n queries; all keys for them.

    >>> print(FirstQ(1).picture(3))
    ###
    ···
    ···
    """

    n: int

    def __post_init__(self) -> None:
        integer(self, "n")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return p < self.n


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Band(Mask):
    """{(p, k) : offset <= p - k < offset + width}; width keys, `offset` tokens behind the query.

    A negative offset lies ahead of the query. `Diagonal` is another name for it.

    >>> print(Band(1, 2).picture(4))
    ····
    #···
    ##··
    ·##·
    """

    offset: int
    width: int = 1

    def __post_init__(self) -> None:
        if integer(self, "offset", None) + integer(self, "width") > MAX_SIZE:
            raise AtomArgumentError(repr(self), f"the band reaches more than {MAX_SIZE} back",
                                    "a smaller offset or width")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return (p - k >= self.offset) & (p - k < self.offset + self.width)


Diagonal = Band


def _half_open(self: Mask) -> None:
    start, stop = integer(self, "start"), integer(self, "stop")
    if stop < start:
        name = type(self).__name__
        raise AtomArgumentError(f"{name}({start}, {stop})", "the range ends before it starts",
                                f"{name}({stop}, {start})")


@atom
@dataclass(frozen=True, slots=True, repr=False)
class QueryRange(Mask):
    """{(p, k) : start <= p < stop}; all keys for those queries.

    >>> print(QueryRange(1, 2).picture(3))
    ···
    ###
    ···
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        _half_open(self)

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return (p >= self.start) & (p < self.stop)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class KeyRange(Mask):
    """{(p, k) : start <= k < stop}; stop - start keys.

    >>> print(KeyRange(1, 2).picture(3))
    ·#·
    ·#·
    ·#·
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        _half_open(self)

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return (k >= self.start) & (k < self.stop)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Chunk(Mask):
    """{(p, k) : p // size == k // size}, the query's own chunk; size keys.

    Source: Llama 4's chunked attention.

    >>> print(Chunk(2).picture(4))
    ##··
    ##··
    ··##
    ··##
    """

    size: int

    def __post_init__(self) -> None:
        integer(self, "size", 1)

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        mine, theirs = p // self.size, k // self.size
        return (mine <= theirs) & (theirs <= mine)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class PrefixLM(Mask):
    """{(p, k) : k < n or k <= p}: a prefix that sees itself both ways, then causal.

    Compile it with `causal=False`; the default would cut the prefix back to causal.
    Source: T5, arXiv 1910.10683, section 3.2.1.

    >>> print(PrefixLM(2).picture(4))
    ##··
    ##··
    ###·
    ####
    """

    n: int

    def __post_init__(self) -> None:
        integer(self, "n")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return (k < self.n) | (k <= p)
