"""The words a plan speaks of tiles and lists with; data only."""

from __future__ import annotations

from dataclasses import dataclass

from maskdsl.dynamic import ListMask, SlotMask

PAD = 32  # empty words on either side of a set whose words are read without a check


@dataclass(frozen=True, slots=True)
class Segment:
    """Key tiles [start, stop), each a variable of the bounds text or a number."""

    start: str
    stop: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of an emitted kernel."""

    name: str
    is_pointer: bool


@dataclass(frozen=True, slots=True)
class ListedTest:
    """A test of the mask that asks call-time lists.

    text    the whole test
    lo, hi  names of the row bounds within it: keys [lo, hi)
    atom    the slot that decides within them, where it alone does
    """

    text: str
    lo: str
    hi: str
    atom: SlotMask | None


@dataclass(frozen=True, slots=True)
class Lists:
    """What the listed loops walk, besides the static ones.

    tables    atoms that are tables of blocks: they make a list of key tiles for each query tile
    slashes   atoms with exact slashes: a list of distances, the same for all query tiles
    columns   atoms with loose columns
    reach     text of the first key and last key + 1 the lists may hold for a query tile
    hulls     the key tiles the static loops visit, in order
    cores     key tiles that are live throughout where the (only) table lists them
    by_head   whether bounds, reach or cores differ by batch entry or head
    """

    atoms: tuple[SlotMask, ...] = ()
    tables: tuple[ListMask, ...] = ()
    slashes: tuple[ListMask, ...] = ()
    columns: tuple[ListMask, ...] = ()
    reach: tuple[str, str] = ("0", "0")
    hulls: tuple[Segment, ...] = ()
    cores: tuple[Segment, ...] = ()
    by_head: bool = False

    @property
    def listed(self) -> bool:
        """Whether there is any list, and not just numbers read for bounds."""
        return bool(self.tables or self.slashes or self.columns)


NO_LISTS = Lists()
