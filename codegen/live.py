"""Live pairs of a call with its data, counted exactly, 64 keys of a row at a time.

The mask's pieces say which words of 64 keys can hold live pairs for 64 query rows: dead words are
not looked at, words live throughout are counted without being made, and only the others are
written out as bits: bounds as runs of ones, a column set as its own words, slashes as words of the
reversed set of distances (a row's distances fall as keys rise), tables as words a row of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maskdsl.codegen.call_data import Bools, HeadData
from maskdsl.codegen.lists import is_table
from maskdsl.codegen.writer import leaves_of
from maskdsl.dynamic import ListMask
from maskdsl.expr import Mask
from maskdsl.spans import Piece, spans
from maskdsl.text import evaluate, write_condition
from maskdsl.tiles import Ints, names_of, row_intervals
from maskdsl.trace import All, Condition, Ge, Has

Words = npt.NDArray[np.uint64]
WORD = 64
CHUNK = 1 << 23  # bytes of one temporary
BATCH = 1024  # words of 64 rows made together
ONES = np.uint64(0xFFFFFFFFFFFFFFFF)
LOW = np.array([(1 << n) - 1 for n in range(WORD + 1)], dtype=np.uint64)  # n low bits


def pack(bits: Bools) -> Words:
    """bool[..., 64 n] as words [..., n], key 0 in the lowest bit."""
    packed: Words = np.packbits(bits, axis=-1, bitorder="little").view("<u8").astype(np.uint64)
    return packed


def count_ones(words: Words) -> int:
    """Set bits of all words together."""
    if hasattr(np, "bitwise_count"):
        return int(np.bitwise_count(words).sum(dtype=np.int64))
    return count_ones_by_sums(words)  # numpy 1


def count_ones_by_sums(words: Words) -> int:
    """`count_ones` with shifts and sums alone: bits of 2, 4, 8 neighbours added up."""
    two, four = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
    eight, ones = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)
    bits = words - ((words >> np.uint64(1)) & two)
    bits = (bits & four) + ((bits >> np.uint64(2)) & four)
    bits = (bits + (bits >> np.uint64(4))) & eight
    return int(((bits * ones) >> np.uint64(56)).sum(dtype=np.int64))


class AtomWords:
    """One list atom of one head as words of 64 keys."""

    def __init__(self, atom: ListMask, data: HeadData) -> None:
        self.shape, self.reach = data.shape, data.reach
        self.words = -(-data.shape.kv_len // WORD)
        columns = np.zeros(self.words * WORD, dtype=bool)
        columns[data.columns(atom)] = True
        self.columns = pack(columns)
        slashes = data.slashes(atom)
        self.shifted: Words | None = self._shift(slashes) if slashes.size else None
        self.below = np.searchsorted(slashes, np.arange(self.reach + 1))
        self.table = data.table(atom) if is_table(atom) else None
        self.first = 0

    def _shift(self, slashes: Ints) -> Words:
        """words[a, n]: bits a + 64 n .. of the reversed set, bit x = distance reach - 1 - x."""
        size = self.reach // WORD + self.words + 2
        bits = np.zeros((size + 1) * WORD, dtype=bool)
        bits[self.reach - 1 - slashes] = True
        return np.stack([pack(bits[a:a + size * WORD]) for a in range(WORD)])

    def enter(self, rows: Ints) -> None:
        """Make the rows of blocks for the query rows `rows`, int64[n] from 0 on."""
        if self.table is None:
            return
        q_block, kv_block = self.table.blocks
        self.first = int(rows[0]) // q_block
        live = self.table.rows(self.first, int(rows[-1]) // q_block + 1)
        wide = np.zeros((len(live), self.words * WORD), dtype=bool)
        wide[:, :self.shape.kv_len] = live.repeat(kv_block, 1)[:, :self.shape.kv_len]
        self.listed = pack(wide)

    def may(self, rows: Ints) -> Bools:
        """bool[blocks, words]: words that may hold a listed pair, for blocks of 64 rows that start
        at `rows`."""
        found = np.broadcast_to(self.columns != 0, (len(rows), self.words)).copy()
        if self.shifted is not None:
            far = rows[:, None] + self.shape.q_offset - WORD * np.arange(self.words)
            top = np.clip(far + WORD, 0, self.reach)
            found |= self.below[top] > self.below[np.clip(far - WORD + 1, 0, self.reach)]
        if self.table is not None:
            any_bit, q_block = self.listed != 0, self.table.blocks[0]
            first = rows // q_block
            last = np.minimum(rows + WORD, self.shape.q_len) - 1
            last = last // q_block
            for i in range(int((last - first).max()) + 1):
                found |= any_bit[np.minimum(first + i, last) - self.first]
        listed: Bools = found
        return listed

    def read(self, p: Ints, word: Ints) -> Words:
        """The words `word` [n, 1] of the rows at positions `p` [n, 64]."""
        found: Words = np.broadcast_to(self.columns[word], p.shape)
        if self.shifted is not None:
            place = np.maximum(self.reach - 1 - p, 0)  # shifts: numpy's // and % take far longer
            place = (place & 63) * self.shifted.shape[1] + (place >> 6) + word
            found = found | self.shifted.ravel().take(place)
        if self.table is not None:
            row = np.minimum(p - self.shape.q_offset, self.shape.q_len - 1)
            found = found | self.listed[row // self.table.blocks[0] - self.first, word]
        return found


@dataclass(frozen=True, slots=True)
class Stretch:
    """One piece on some blocks of 64 rows.

    lo, hi     keys [lo, hi) of every row, int64[blocks, 64]
    hull, core bool[blocks, words]: words the piece may touch, words inside it for all 64 rows
    """

    piece: Piece
    lo: Ints
    hi: Ints
    hull: Bools
    core: Bools


def count_live(mask: Mask, data: HeadData) -> int:
    """Live pairs of one head of a mask with lists, exact."""
    shape = data.shape
    if not shape.q_len or not shape.kv_len:
        return 0
    pieces = spans(mask)
    names = names_of(shape, data.batch, data.head, mask, data.bound)
    atoms = {leaf.atom: AtomWords(leaf.atom, data) for piece in pieces
             for leaf in leaves_of(piece.rest)}
    words = -(-shape.kv_len // WORD)
    wide = max([1, *(shape.kv_len // atom.table.blocks[0] for atom in atoms.values()
                     if atom.table is not None)])
    blocks = max(1, min(CHUNK // (8 * words), CHUNK // (WORD * wide)))
    total = 0
    for first in range(0, shape.q_len, blocks * WORD):
        rows = np.arange(first, min(first + blocks * WORD, shape.q_len), dtype=np.int64)
        for atom in atoms.values():
            atom.enter(rows)
        total += Rows(rows, words, names, atoms, data).count(pieces)
    return total


class Rows:
    """Some query rows of one head, in blocks of 64."""

    def __init__(self, rows: Ints, words: int, names: dict[str, Any],
                 atoms: dict[Any, AtomWords], data: HeadData) -> None:
        self.rows, self.words, self.names, self.atoms, self.data = rows, words, names, atoms, data
        self.starts = rows[::WORD]
        p = np.arange(len(self.starts) * WORD, dtype=np.int64) + int(rows[0])
        self.p = (p + data.shape.q_offset).reshape(-1, WORD)

    def count(self, pieces: tuple[Piece, ...]) -> int:
        """Live pairs of these rows."""
        found = [self.stretch(piece) for piece in pieces]
        full = np.zeros((len(self.starts), self.words), dtype=bool)
        mixed = np.zeros_like(full)
        for one in found:
            if one.piece.is_exact:
                full |= one.core
            mixed |= one.hull
        mixed &= ~full
        total = int(full.sum()) * WORD * WORD
        block, word = np.nonzero(mixed)
        for i in range(0, len(block), BATCH):
            total += self.count_words(found, block[i:i + BATCH], word[i:i + BATCH])
        return total

    def stretch(self, piece: Piece) -> Stretch:
        """Where one piece lies; rows past the end have no keys."""
        shape = self.data.shape
        lo, hi = (np.zeros(self.p.shape, dtype=np.int64) for _ in range(2))
        count = len(self.rows)
        lo.flat[:count], hi.flat[:count] = row_intervals(
            piece, self.rows + shape.q_offset, shape, self.data.head, self.names)
        alive = lo < hi
        first = np.where(alive, lo, shape.kv_len).min(1)
        last = np.where(alive, hi, 0).max(1)
        word = np.arange(self.words)
        hull = (word >= first[:, None] // WORD) & (word < -(-last[:, None] // WORD))
        core = (WORD * word >= lo.max(1)[:, None]) & (WORD * word + WORD <= hi.min(1)[:, None])
        if not piece.is_exact:
            hull &= self.may(piece.rest)
        return Stretch(piece, lo, hi, hull, core)

    def may(self, rest: Condition) -> Bools:
        """bool[blocks, words]: where a condition may hold; True where it is not known."""
        if isinstance(rest, Has) and rest.held:
            return self.atoms[rest.atom].may(self.starts)
        everywhere = np.ones((len(self.starts), self.words), dtype=bool)
        if isinstance(rest, (Has, Ge)):
            return everywhere
        found = everywhere if isinstance(rest, All) else ~everywhere
        for arg in rest.args:
            found = found & self.may(arg) if isinstance(rest, All) else found | self.may(arg)
        return found

    def count_words(self, found: list[Stretch], block: Ints, word: Ints) -> int:
        """Live pairs of the words `word`[n] of the row blocks `block`[n]."""
        bits = np.zeros((len(block), WORD), dtype=np.uint64)
        for one in found:
            here = np.flatnonzero(one.hull[block, word])
            if not here.size:
                continue
            at, key_word = block[here], word[here][:, None]
            made = np.full((len(here), WORD), ONES)
            edge = np.flatnonzero(~one.core[at, key_word[:, 0]])
            start = WORD * key_word[edge]
            low = LOW[np.clip(one.lo[at[edge]] - start, 0, WORD)]
            made[edge] = LOW[np.clip(one.hi[at[edge]] - start, 0, WORD)] & ~low
            if not one.piece.is_exact:
                made &= self.test(one.piece.rest, self.p[at], key_word)
            bits[here] |= made
        return count_ones(bits)

    def test(self, rest: Condition, p: Ints, word: Ints) -> Words:
        """The words [n, 64] of a condition on rows p [n, 64] and words `word` [n, 1]."""
        if isinstance(rest, Has):
            found = self.atoms[rest.atom].read(p, word)
            return found if rest.held else ~found
        if isinstance(rest, Ge):
            keys = WORD * word[:, :, None] + np.arange(WORD)
            live = evaluate(write_condition(rest), **self.names, p=p[:, :, None], k=keys)
            return pack(np.broadcast_to(live, (*p.shape, WORD)))[..., 0]
        parts = [self.test(arg, p, word) for arg in rest.args]
        result = np.full(p.shape, ONES if isinstance(rest, All) else np.uint64(0))
        for part in parts:
            result = result & part if isinstance(rest, All) else result | part
        return result
