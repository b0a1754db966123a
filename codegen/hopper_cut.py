"""Which calls the Hopper kernel takes, and how it cuts them: all on the host, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from maskdsl.codegen.emit_hopper import fits_letter, tells_apart
from maskdsl.codegen.lists import group_heads
from maskdsl.codegen.long_items import cut_long
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import LONG, make_plan, make_sifted, mean_row_width
from maskdsl.codegen.tune import DENSE_WIDTH
from maskdsl.codegen.visits import static_steps
from maskdsl.dynamic import slots_of
from maskdsl.expr import Mask
from maskdsl.heads import count_heads
from maskdsl.periodic import RandomBlocks
from maskdsl.shape import Shape
from maskdsl.where import Where

ROWS = 128  # of an item of two computing warp groups, 64 each
GRAIN, BLOCK_N = 32, 128  # keys of a grain (the bits of a word) and of a tile where it fits
TILE = BLOCK_N // GRAIN
LARGEST_DIM = 256
SMALL_DIM = 64  # the largest with room for the registers of three computing warp groups
LISTED_DIM = 128  # the largest of masks with data that comes with the call
# bytes of shared memory for queries, keys, values and output; barriers and letters take the rest
RING_BYTES = 229376
# (places for the queries of an item, keys of a tile, slots of keys and of values), best first
ROOMS = ((2, 128, 4, 4), (2, 128, 3, 3), (2, 128, 2, 3), (2, 128, 2, 2), (1, 128, 2, 2),
         (2, 64, 4, 4), (2, 64, 3, 3), (1, 64, 3, 3), (1, 64, 3, 2), (1, 64, 2, 2))
ELEMENT = 2  # bytes: the kernel takes 16-bit inputs
L2_BYTES = 32 << 20  # keys and values of the heads that run side by side should fit the L2 cache
SHARE = 0.5  # an item longer than this part of one multiprocessor's work is cut along its keys
LEAST_SHARE = 16.0  # steps; joining the parts costs a launch


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """How the kernel is cut.

    heads_packed  query heads of an item; they share a key/value head and so its key tiles
    narrow        keys of an item's first tile; every other has block_n
    k_slots       tiles of keys in flight; v_slots: of values
    block_n       keys of a tile
    letters       items whose queries are in shared memory: 2, or 1 where they are large; then the
                  next item's queries replace them as soon as the last scores are there
    padded        rows of 65 to 96 elements are padded to 128; else they are kept as three times 32
    computing     computing warp groups, of 64 rows each: 2 or 3
    """

    heads_packed: int
    narrow: int
    k_slots: int
    v_slots: int
    registers: int = 232
    block_n: int = BLOCK_N
    letters: int = 2
    padded: bool = True
    computing: int = 2

    @property
    def tile(self) -> int:
        """Grains of a tile."""
        return self.block_n // GRAIN

    @property
    def rows(self) -> int:
        """Rows of an item: heads x positions."""
        return 64 * self.computing

    @property
    def span(self) -> int:
        """Positions of an item."""
        return self.rows // self.heads_packed


@lru_cache(maxsize=256)
def refuse_mask(mask: Mask, by_name: bool = False) -> str:
    """Why the Hopper kernel does not take a mask; "" where it does.

    by_name  whether it was asked for by name: it then takes what the portable kernel is faster at,
             too (docs/benchmarks/coverage.md, vertical_slash.md)
    """
    if slots_of(mask):
        if count_heads(mask):
            return "the mask reads data that comes with the call and differs by kind of head"
        if by_name:
            from maskdsl.codegen.hopper_lists import refuse_listed

            return refuse_listed(mask)
        return ("the mask reads data that comes with the call, where the portable kernel is mostly "
                "faster; backend='hopper' takes it")
    kinds = [one for _, one in kinds_of(mask)]
    if any(map(has_dead_tiles, kinds)):
        if len(kinds) > 1:
            return ("a kind of head has dead tiles inside its intervals, which only the portable "
                    "kernel skips")
        if not by_name and any(isinstance(node, RandomBlocks | Where) for node in mask.walk()):
            return ("the mask's dead tiles follow no period, where the portable kernel is faster; "
                    "backend='hopper' takes it")
    if not all(fits_letter(make_plan(one, ROWS // 4, GRAIN, TILE)) for one in kinds):
        return "the mask has too many separate intervals"
    return ""


def has_dead_tiles(mask: Mask) -> bool:
    """Whether it pays to ask tile by tile which are dead: then grains are listed."""
    return make_plan(mask, 64, 64).sieve is not None


@lru_cache(maxsize=256)
def kinds_of(mask: Mask) -> tuple[tuple[tuple[int, ...], Mask], ...]:
    """(query heads, their mask) of every kind of head, costliest first; ((), mask) where all heads
    share one."""
    return tuple(sorted(group_heads(mask), key=lambda kind: -mean_row_width(kind[1])))


def make_plans(mask: Mask, span: int, tile: int) -> tuple[Plan, ...]:
    """A plan for every kind of head; span in positions, tile in grains."""
    kinds = [one for _, one in kinds_of(mask)]
    # (tiles of two grains, at D = 256, are mostly borders; and one number more would spill)
    if len(kinds) == 1 and tile == TILE and not has_dead_tiles(mask):
        plan = make_plan(mask, span, GRAIN, tile, apart=True)
        if tells_apart(plan):
            return (plan,)
    return tuple((make_sifted if has_dead_tiles(one) else make_plan)(one, span, GRAIN, tile)
                 for one in kinds)


def packs(mask: Mask, count: int) -> bool:
    """Whether `count` neighbouring heads can share an item: one mask, whatever the head."""
    if count > 1 and any(plan.needs_head for plan in make_plans(mask, ROWS // count, TILE)):
        return False
    return all(set(range(head - head % count, head - head % count + count)) <= set(heads)
               for heads, _ in kinds_of(mask) for head in heads)


def head_groups(mask: Mask, count: int) -> tuple[tuple[int, ...], ...]:
    """For every kind the first head of each of its groups of `count` heads; () for one kind."""
    return tuple(heads[::count] for heads, _ in kinds_of(mask) if heads)


def refuse_dims(head_dim: int, value_dim: int, lists: bool = False) -> str:
    """Why the Hopper kernel does not take head dimensions; "" where it does.

    lists  whether the mask reads data that comes with the call: its rows are always one part
    """
    largest = max(head_dim, value_dim)
    if lists and largest > LISTED_DIM:
        return (f"head dimension {largest} is beyond {LISTED_DIM}, the most that masks with data "
                "that comes with the call have there")
    if largest > LARGEST_DIM:
        return f"head dimension {largest} is beyond {LARGEST_DIM}"
    if width_of(value_dim) > width_of(head_dim):
        return "values are wider than queries"
    return ""


def parts_of(dim: int, padded: bool = True) -> tuple[int, int]:
    """(parts, elements of a part) of a row in shared memory: parts are tiles of their own that lie
    side by side, since a tile must have a power of two of elements a row, in whole swizzle lines
    of 128 or (three times 32) 64 bytes."""
    if dim <= 64:
        return 1, 64
    if dim <= 96 and not padded:
        return 3, 32
    if dim <= 128:
        return 1, 128
    return (3, 64) if dim <= 192 else (2, 128)


def value_parts(head_dim: int, value_dim: int, padded: bool = True) -> tuple[int, int]:
    """(parts, elements of a part) of values and output. No part is wider than one of the queries,
    whose place the output takes."""
    parts, width = parts_of(value_dim, padded)
    narrow = min(width, parts_of(head_dim, padded)[1])
    return parts * width // narrow, narrow


def width_of(dim: int, padded: bool = True) -> int:
    """Elements of a row in shared memory."""
    parts, width = parts_of(dim, padded)
    return parts * width


@lru_cache(maxsize=256)
def pick_room(head_dim: int, value_dim: int, padded: bool = True,
              most_keys: int = BLOCK_N, rows: int = ROWS) -> tuple[int, int, int, int]:
    """(letters, keys of a tile, slots of keys, of values): the first of ROOMS that fits, with tiles
    of at most so many keys."""
    d, (parts, width) = width_of(head_dim, padded), value_parts(head_dim, value_dim, padded)
    for letters, keys, k_slots, v_slots in ROOMS:
        output = rows * width if letters == 1 else 0
        elements = letters * rows * d + output + keys * (k_slots * d + v_slots * parts * width)
        if keys <= most_keys and ELEMENT * elements <= RING_BYTES:
            return letters, keys, k_slots, v_slots
    raise AssertionError((head_dim, value_dim))


def other_rooms(head_dim: int, value_dim: int) -> list[tuple[int, int, int, int, bool]]:
    """What else could be tried: rows padded, tiles of 64 keys (room and `padded`)."""
    both = head_dim, value_dim or head_dim
    pads = (False, True) if is_padded(*both) else (True,)
    return [(*pick_room(*both, pad, keys), pad) for keys in (BLOCK_N, 64) for pad in pads]


def is_padded(head_dim: int, value_dim: int) -> bool:
    """Whether there are rows that could be padded to 128 elements, and need not be."""
    return any(width_of(dim) != width_of(dim, False) for dim in (head_dim, value_dim))


def room_config(config: HopperConfig, letters: int, keys: int, k_slots: int, v_slots: int,
                padded: bool) -> HopperConfig:
    """A config with another room."""
    return replace(config, narrow=min(config.narrow, keys), k_slots=k_slots, v_slots=v_slots,
                   block_n=keys, letters=letters, padded=padded)


@lru_cache(maxsize=256)
def pick_hopper(mask: Mask, group: int, head_dim: int, value_dim: int = 0) -> HopperConfig:
    """The config for a mask, heads per key/value head and head dimensions (value_dim 0: the
    same)."""
    packed = next(n for n in (4, 2, 1) if group % n == 0 and packs(mask, n))
    value_dim = value_dim or head_dim
    padded = not is_padded(head_dim, value_dim)  # where rows need not be padded they are not
    computing = pick_computing(mask, head_dim, value_dim)
    rows = 64 * computing
    letters, keys, k_slots, v_slots = pick_room(head_dim, value_dim, padded, rows=rows)
    narrow = pick_narrow(make_plans(mask, rows // packed, keys // GRAIN), keys,
                         tuple(len(heads) for heads, _ in kinds_of(mask)))
    if computing == 3:
        narrow = min(narrow, 64)  # more would not fit the registers
    return HopperConfig(packed, narrow, k_slots, v_slots, 160 if computing == 3 else 232,
                        block_n=keys, letters=letters, padded=padded, computing=computing)


def pick_computing(mask: Mask, head_dim: int, value_dim: int) -> int:
    """Warp groups that compute: three where small head dimensions leave registers for them and
    items of all heads are long; on short ones trials were slower."""
    small = max(head_dim, value_dim) <= SMALL_DIM
    long = len(kinds_of(mask)) == 1 and mean_row_width(mask) >= DENSE_WIDTH
    return 3 if small and long else 2


def pick_narrow(plans: tuple[Plan, ...], block_n: int, heads: tuple[int, ...]) -> int:
    """The width of the first tile that leaves the fewest empty columns in a long call.

    heads  how many heads have each plan; only their ratios matter
    """
    loose = [count_grains(plan, LONG)[0] for plan in plans]

    def columns(narrow: int) -> float:
        rest = [np.maximum(one - narrow // GRAIN, 0) for one in loose]
        return sum(max(count, 1) * float((narrow + block_n * -(-one // (block_n // GRAIN))).mean())
                   for one, count in zip(rest, heads, strict=True))

    return min((n for n in (128, 64, 32) if n <= block_n), key=columns)


def count_grains(plan: Plan, shape: Shape, batch: int = 0, head: int = 0) -> tuple[Any, Any]:
    """(loose, full) grains of every query tile, int64[query tiles]."""
    values = plan.run_bounds(shape, batch, head)
    full, loose = static_steps(plan, shape, values)
    return loose, full


def count_tiles(plan: Plan, config: HopperConfig, shape: Shape, batch: int = 0,
                head: int = 0) -> tuple[Any, Any]:
    """(masked, FULL) tiles of every query tile after its first tile, int64[query tiles].

    A query tile without either takes one masked tile, which then finds every pair dead.
    """
    loose, grains = count_grains(plan, shape, batch, head)
    masked = -(-np.maximum(loose - config.narrow // GRAIN, 0) // config.tile)
    full = grains // config.tile
    return np.where(masked + full == 0, 1, masked), full


def count_steps(plan: Plan, config: HopperConfig, shape: Shape) -> Any:
    """Steps of every query tile after its first tile, int64[query tiles]."""
    masked, full = count_tiles(plan, config, shape)
    return masked + full


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the items of a call are ordered and cut.

    section                   groups of heads that run side by side
    split_first, split_count  query tiles whose keys are cut into `splits` ranges
    """

    items: int
    q_tiles: int
    section: int
    split_first: int
    split_count: int
    splits: int


def schedule(plan: Plan, config: HopperConfig, shape: Shape, groups: int, section: int,
             processors: int, kinds: int = 1) -> Schedule:
    """Cut the few long items (LastQ rows see the whole prompt), so that none is the tail.

    groups  groups of heads, all batch entries together
    kinds   of heads; where there are several, no item is cut: the costliest kind starts first; nor
            is one of a mask with dead tiles, whose grains are counted on the GPU only
    """
    q_tiles = -(-shape.q_len // config.span)
    whole = Schedule(q_tiles * groups, q_tiles, section, 0, 0, 1)
    if plan.needs_head or kinds > 1 or plan.sieve is not None:
        return whole
    steps = count_steps(plan, config, shape) + 1
    share = max(float(steps.sum()) * groups / processors * SHARE, LEAST_SHARE)
    first, count, splits = cut_long(steps, share, lambda long: int(long.min()) - 1)
    items = (q_tiles + count * (splits - 1)) * groups
    return Schedule(items, q_tiles, section, first, count, splits)


def pick_section(mask: Mask, kv_len: int, row_bytes: int, groups: int, per_kv_head: int) -> int:
    """Groups of heads that run side by side: of a nearly dense mask only as many as keep their
    keys and values in the L2 cache, else all (H100: +5 % dense, -6 to -15 % on triangles)."""
    if mean_row_width(mask) < DENSE_WIDTH:
        return groups
    heads = max(1, L2_BYTES // max(kv_len * row_bytes, 1))
    most = min(groups, heads * per_kv_head)
    return next(n for n in range(most, 0, -1) if groups % n == 0)
