"""What a call costs, in numbers a user can check: pairs, tiles, memory."""

from __future__ import annotations

from dataclasses import dataclass

from maskdsl.codegen.bounds import describe_piece
from maskdsl.codegen.counts import count_closed
from maskdsl.codegen.lists import base_of
from maskdsl.codegen.plan import Plan
from maskdsl.shape import Shape
from maskdsl.tiles import count_pairs

PAIR_LIMIT = 1 << 30  # pairs that are counted one by one where no interval decides


@dataclass(frozen=True, slots=True)
class Explanation:
    """The cost of one call, for each head (the first, where heads differ). `str()` is the text
    for people.

    live_pairs    (query, key) pairs the mask keeps; None where only testing could tell and there
                  are too many
    closed_form   live pairs of a square call of N tokens, as text; "" where there is none
    full_tiles    key tiles computed without a mask
    masked_tiles  key tiles computed with one
    all_tiles     key tiles of the whole rectangle
    mask_bytes    memory the mask itself takes at run time: 0, there is no table; None for a mask
                  with slots, whose lists depend on the call's data
    slots         the atoms whose data arrives at the call; pairs and tiles count them as empty, and
                  documents as one
    """

    mask: str
    backend: str
    shape: Shape
    tile: tuple[int, int]
    pieces: tuple[str, ...]
    sieved: bool
    live_pairs: int | None
    closed_form: str
    full_tiles: int
    masked_tiles: int
    all_tiles: int
    mask_bytes: int | None
    output_bytes: int
    dense_bytes: int
    slots: tuple[str, ...] = ()

    @property
    def visited_tiles(self) -> int:
        """Key tiles that are computed."""
        return self.full_tiles + self.masked_tiles

    @property
    def tile_speedup(self) -> float:
        """Tiles of dense causal attention for each tile visited: the speed-up to expect."""
        rows, shape = self.tile[0], self.shape
        causal = sum(-(-max(0, min(shape.kv_len, shape.q_offset + min(r + rows, shape.q_len)))
                       // self.tile[1]) for r in range(0, shape.q_len, rows))
        return causal / max(1, self.visited_tiles)

    def __str__(self) -> str:
        shape, pairs = self.shape, self.shape.q_len * self.shape.kv_len
        live = "not counted (opaque over too many pairs)" if self.live_pairs is None else \
            f"{self.live_pairs:,} of {pairs:,} ({100 * self.live_pairs / max(1, pairs):.3g} %)"
        lines = [
            f"mask          {self.mask}",
            f"call          {shape.q_len:,} queries at {shape.q_offset:,}, {shape.kv_len:,} keys, "
            f"prompt of {shape.total_len:,}",
            f"backend       {self.backend}, tiles of {self.tile[0]} queries x {self.tile[1]} keys",
            f"live pairs    {live}",
            *([f"closed form   {self.closed_form}"] if self.closed_form else []),
            f"tiles         {self.full_tiles:,} full + {self.masked_tiles:,} masked of "
            f"{self.all_tiles:,}{', dead ones sieved out' if self.sieved else ''}",
            f"dense causal  {self.tile_speedup:.1f}x as many tiles",
            f"memory        mask {'by its data' if self.mask_bytes is None else self.mask_bytes}"
            f"{'' if self.mask_bytes is None else ' bytes'}; output {self.output_bytes:,}; a dense "
            f"mask would take {self.dense_bytes:,}",
            *([f"slots         {', '.join(self.slots)}: not counted, their data comes at the call"]
              if self.slots else []),
            *(f"{'pieces' if i == 0 else '':<13} {text}" for i, text in enumerate(self.pieces)),
        ]
        return "\n".join(lines)


def explain_call(plan: Plan, mask: str, shape: Shape, backend: str, heads: int,
                 head_dim: int) -> Explanation:
    """Count what one call visits; `heads` and `head_dim` size the output (2 bytes an element)."""
    full, masked = plan.count_tiles(shape)
    exact = all(piece.is_exact for piece in plan.pieces)
    few = shape.q_len * shape.kv_len <= PAIR_LIMIT
    base = base_of(plan.mask)
    closed = None if plan.lists.atoms else count_closed(base)
    return Explanation(
        mask=mask, backend=backend, shape=shape, tile=(plan.block_m, plan.block_n),
        pieces=tuple(map(describe_piece, plan.pieces)), sieved=plan.sieve is not None,
        live_pairs=count_pairs(base, shape) if exact or few else None,
        closed_form=f"{closed.pairs} pairs for N tokens, N >= {closed.valid_from}"
        if closed else "",
        full_tiles=full, masked_tiles=masked,
        all_tiles=-(-shape.q_len // plan.block_m) * -(-shape.kv_len // plan.block_n),
        mask_bytes=None if plan.lists.atoms else 0, slots=tuple(map(repr, plan.lists.atoms)),
        output_bytes=2 * heads * head_dim * shape.q_len,
        dense_bytes=shape.q_len * shape.kv_len)
