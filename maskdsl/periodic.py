"""Atoms of many pieces: periodic ones, static lists, pseudo-random blocks.

They share the conventions of `maskdsl.atoms`: p the absolute query position, k the key index.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from maskdsl.arguments import MAX_RUNS, MAX_SIZE, check_runs, in_runs, integer, integers
from maskdsl.errors import AtomArgumentError
from maskdsl.expr import Bool, Index, Mask, Place, atom


@atom
@dataclass(frozen=True, slots=True, repr=False)
class BlockDiagonal(Mask):
    """Blocks of the given sizes packed one after another; each query sees its own block.

    {(p, k) : start_i <= p, k < start_i + sizes[i] for one i}; sizes[i] keys. Defined up to
    sum(sizes) tokens; a longer call is a LengthError.

    >>> print(BlockDiagonal([1, 2]).picture(3))
    #··
    ·##
    ·##
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = integers(self, "sizes", 1)
        object.__setattr__(self, "sizes", sizes)
        if not 0 < len(sizes) <= MAX_RUNS:
            raise AtomArgumentError(f"BlockDiagonal with {len(sizes)} sizes",
                                    f"needs between 1 and {MAX_RUNS} blocks",
                                    "BlockDiagonal([128, 256]), or Chunk(n) for equal blocks")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        result: Bool = None
        for a, b in pairwise(accumulate(self.sizes, initial=0)):
            block = (p >= a) & (p < b) & (k >= a) & (k < b)
            result = block if result is None else result | block
        return result

    def limit(self) -> int | None:
        return sum(self.sizes)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Stride(Mask):
    """{(p, k) : k % step == offset}; every step-th key.

    Source: Sparse Transformer, arXiv 1904.10509, section 4.3 (the "summary" keys).

    >>> print(Stride(2).picture(4))
    #·#·
    #·#·
    #·#·
    #·#·
    """

    step: int
    offset: int = 0

    def __post_init__(self) -> None:
        step, offset = integer(self, "step", 1), integer(self, "offset")
        if offset >= step:
            raise AtomArgumentError(f"Stride({step}, {offset})",
                                    f"k % {step} is never {offset}",
                                    f"Stride({step}, {offset % step})")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return (k % self.step >= self.offset) & (k % self.step <= self.offset)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Dilated(Mask):
    """{(p, k) : 0 <= p - k < window * step and (p - k) % step == 0}; window keys, step apart.

    Source: Longformer, arXiv 2004.05150, section 3.1 (dilated sliding window).

    >>> print(Dilated(2, 2).picture(4))
    #···
    ·#··
    #·#·
    ·#·#
    """

    window: int
    step: int

    def __post_init__(self) -> None:
        if integer(self, "window") * integer(self, "step", 1) > MAX_SIZE:
            raise AtomArgumentError(repr(self), f"the window reaches more than {MAX_SIZE} back",
                                    f"Dilated({MAX_SIZE // self.step}, {self.step})")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        mine, theirs = p % self.step, k % self.step
        near = (p - k >= 0) & (p - k < self.window * self.step)
        return near & (mine <= theirs) & (theirs <= mine)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Slash(Mask):
    """{(p, k) : p - k in offsets}, whole diagonals; len(offsets) keys.

    Source: MInference, arXiv 2407.02490, section 3 (the static half of vertical-slash).

    >>> print(Slash([0, 2]).picture(4))
    #···
    ·#··
    #·#·
    ·#·#
    """

    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(sorted(set(integers(self, "offsets", None)))))
        check_runs(self, "offsets", self.offsets)

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return in_runs(p - k, self.offsets)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Vertical(Mask):
    """{(p, k) : k in columns}; len(columns) keys, the same for every query.

    Source: MInference, arXiv 2407.02490, section 3 (the static half of vertical-slash).

    >>> print(Vertical([0, 2]).picture(3))
    #·#
    #·#
    #·#
    """

    columns: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(sorted(set(integers(self, "columns", 0)))))
        check_runs(self, "columns", self.columns)

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return in_runs(k, self.columns)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class RandomBlocks(Mask):
    """`count` pseudo-random key blocks for every block of queries; about count * block keys.

    {(p, k) : k // block == f_i(p // block) for one i < count}, f_i a seeded congruential hash
    into the blocks of total_len. A formula, not a table: it works at any length, costs no memory,
    and gives the same blocks in every process. Two of the `count` blocks may coincide.

    Source: BigBird, arXiv 2007.14062, section 2 (random attention).

    >>> print(RandomBlocks(1, 1, seed=3).picture(4))
    ···#
    ·#··
    ··#·
    #···
    """

    block: int
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        integer(self, "block", 1)
        integer(self, "seed")
        if integer(self, "count", 1) > 64:
            raise AtomArgumentError(repr(self), "at most 64 random blocks a row", "count=3")

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        blocks = (at.total_len + self.block - 1) // self.block
        mine, theirs = p // self.block, k // self.block
        result: Bool = None
        for i in range(self.count):
            # The modulus is a prime below 2**15, so no product passes 2**31 in the kernel.
            x = (mine % 32749 + (self.seed * 64 + i) * 7919 % 32749) % 32749
            x = (x * 16807 + 11) % 32749
            x = (x * x + 30341) % 32749
            target = (x * 2713 + 1283) % 32749 % blocks
            hit = (target <= theirs) & (theirs <= target)
            result = hit if result is None else result | hit
        return result
