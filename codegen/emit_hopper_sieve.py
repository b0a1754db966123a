"""Masks with dead tiles inside their intervals on Hopper: what their file has of its own.

The planning warp asks every grain of an item's masked stretches whether it may hold a live pair
(`sieve`), 32 grains at a time, and writes the numbers of those that may, in order, into the
program's own room in global memory. The letter tells where; loading and computing groups read the
list where other masks compute a grain's place.

A program has three lists in turn. When the planning warp opens an item, all have given back the
letter of the item three before it: the letter of the item before this one took its place.
"""

from __future__ import annotations

from maskdsl.codegen.emit_hopper import in_gluon, places_of
from maskdsl.codegen.emit_walk import indent
from maskdsl.codegen.plan import Plan

PAD = 16  # entries past the end of a list that a tile may ask for
LISTS = 3

ADD = '''@gluon.jit
def add(a, b):
    """a + b, for sums from the first lane to each."""
    return a + b


'''


def list_names(plan: Plan) -> list[str]:
    """The mask's own numbers of an item: where its list lies, and those of the FULL tiles."""
    return ["listed_at", *places_of(plan)[1].names]


def sieve_bounds(plan: Plan) -> tuple[str, ...]:
    """The body of `find_tiles`: bounds, then the list."""
    loose, full = places_of(plan)
    sieve = plan.sieve
    assert sieve is not None
    full_count = f"full_count{len(full.lines)}" if full.lines else "gl.to_tensor(0)"
    step = ("i = begin + lane", f"tile = {loose.text}", "start = tile * BLOCK_N",
            "stop = tl.minimum(start + BLOCK_N, kv_len) - 1  # the grain's last key", *sieve.lines,
            f"live = {sieve.test} & (i < loose_count{len(loose.lines)})",
            "one = tl.where(live, 1, 0)",
            "before = gl.associative_scan(one, 0, add) - one",
            "gl.store(own_table + (listed_at + count + before), tile, mask=live)",
            "count += gl.sum(one, axis=0)")
    return in_gluon((
        *plan.bounds, *loose.lines, *full.lines, *sieve.setup,
        "# the grains that may hold a live pair, in order",
        "lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))",
        f"listed_at = (gl.program_id(0) * {LISTS} + kind) * "
        f"((kv_len + BLOCK_N - 1) // BLOCK_N + {PAD})",
        "count = gl.to_tensor(0)",
        f"for begin in range(0, loose_count{len(loose.lines)}, 32):",
        *(f"    {line}" for line in step),
        f"return count, {full_count}, ({', '.join(list_names(plan))},)"))


def sieve_pieces(plan: Plan) -> dict[str, str]:
    """The marks that other masks fill otherwise; in order, before those."""
    own = list_names(plan)
    unpack = f"{', '.join(own)}, own_table = state"
    return {
        "    # <STATE>\n    # <GRAIN_AT>\n": indent((
            unpack, "return gl.load(own_table + (listed_at + i))")),
        "    # <STATE>\n    # <FULL_AT>\n": indent((
            unpack, *in_gluon((f"return {places_of(plan)[1].text}",)))),
        "    # <BOUNDS>\n": indent(sieve_bounds(plan)),
        "        # <OWN>\n": indent(("state = state + (own_table,)",), 2),
        "    # <OWN>\n": indent(("state = state + (own_table,)",)),
        "    # <KINDS>\n": indent((f"kind = count % {LISTS}  # which of the program's lists",)),
    }
