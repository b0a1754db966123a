"""What a call costs, in numbers a user can check: pairs, tiles, memory, predicted time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx

from maskdsl.atoms import Causal
from maskdsl.codegen.bounds import describe_piece
from maskdsl.codegen.cost import ITEM_BYTES, Prediction, memory_bytes
from maskdsl.codegen.counts import count_closed
from maskdsl.codegen.forecast import (
    HOPPER,
    find_crossover,
    forecast,
    forecast_dense,
    refuse_crossover,
    total_pairs,
    total_visited,
)
from maskdsl.codegen.hopper_work import HopperCut, count_hopper
from maskdsl.codegen.lists import base_of, group_heads, sort_atoms
from maskdsl.codegen.rates import Rates
from maskdsl.codegen.report import (
    Table,
    as_dict,
    format_heads,
    html,
    markdown,
    name_heads,
    rich_table,
    table_of,
    text,
)
from maskdsl.codegen.visits import Visited
from maskdsl.codegen.workload import CallHeads, KindWork, count_work
from maskdsl.expr import Mask
from maskdsl.shape import Shape
from maskdsl.simplify import simplify
from maskdsl.tiles import count_pairs
from maskdsl.trace import is_traceable


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be explained.

    mask     simplified; written: as the user wrote it, before simplification
    why      why this backend
    kernel   the backend whose work is counted: the one that runs here, or on a chip that was named
    refused  why it is not the Hopper kernel, on a chip that has it; else ""
    tile     of that kernel, in tokens; chosen: the user's, or None
    data     the slots' data, checked; None: not given
    rates    of the chip and kernel to predict for; None: no prediction, and no_rates says why
    dense_rates  of the kernel that dense attention runs there; None: the same
    widen    gives a superset that can be planned, where a mask cannot be traced; None: none needed
    """

    mask: Mask
    written: Mask
    backend: str
    why: str
    kernel: str
    refused: str
    shape: Shape
    call: CallHeads
    tile: tuple[int, int]
    chosen: tuple[int, int] | None = None
    data: Mapping[str, Any] | None = None
    rates: Rates | None = None
    dense_rates: Rates | None = None
    no_rates: str = ""
    estimator: str | None = None
    widen: Callable[[Mask], Mask] | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The cost of one call, all its heads and batch entries together. `str()` is the text for
    people; `to_dict`, `markdown`, `_repr_html_` and `graph` are the same in other forms.

    mask          the mask as it is compiled; written: as it was given
    laws          the laws that simplified it, each once
    backend       what runs here; why: why
    kernel        the backend whose work is counted: what runs here, or what a chip that was named
                  would run; refused: why it is not the Hopper kernel, on a chip that has it
    tile          (queries, keys) per tile; of the Hopper kernel (rows, keys), where the rows of an
                  item are heads x positions
    cut           how the Hopper kernel cuts the call: heads an item, keys of its first tile, rows
                  whose keys are cut into ranges; None: another kernel
    live_pairs    (query, key) pairs the mask keeps; None where only testing could tell and there
                  are too many
    closed_form   live pairs of one head of a square call of N tokens, as text; of PerHead a line
                  for each kind of head; "" where there is none
    kinds         what each kind of head does: its mask, number of heads, pairs, tiles
    visited       steps of the loops of all heads
    all_tiles     key tiles of the whole rectangle, all heads
    mask_bytes    memory the mask itself takes at run time: 0, there is no table; None for a mask
                  with slots, whose lists depend on the call's data
    output_bytes, input_bytes  of the call's tensors, 2 bytes an element
    dense_bytes   what a dense boolean mask for one head would take
    slots         the atoms whose data arrives at the call; counted: whether their data was given,
                  else pairs and tiles count them as empty, and documents as one
    is_dense      whether the mask keeps all causal pairs of this call
    prediction    predicted time of the call on a named chip; None with no_prediction saying why
    dense         predicted time of dense causal attention there, by the kernel that would run it
    crossover     shortest length, in tokens, from which the mask is predicted to be faster than
                  dense; None with no_crossover saying why
    fallback      what a layer policy would do, where one was asked; else ""
    """

    mask: str
    written: str
    laws: tuple[str, ...]
    backend: str
    why: str
    kernel: str
    refused: str
    shape: Shape
    call: CallHeads
    tile: tuple[int, int]
    cut: HopperCut | None
    pieces: tuple[str, ...]
    sieved: bool
    live_pairs: int | None
    closed_form: str
    kinds: tuple[KindWork, ...]
    visited: Visited
    all_tiles: int
    mask_bytes: int | None
    output_bytes: int
    input_bytes: int
    dense_bytes: int
    slots: tuple[str, ...]
    counted: bool
    is_dense: bool
    prediction: Prediction | None
    no_prediction: str
    dense: Prediction | None
    crossover: int | None
    no_crossover: str
    fallback: str = ""

    @property
    def full_tiles(self) -> int:
        """Key tiles computed without a mask."""
        return self.visited.full + self.visited.listed_full

    @property
    def masked_tiles(self) -> int:
        """Key tiles computed with one, gathered columns not among them."""
        return self.visited.masked + self.visited.listed_part + self.visited.slash

    @property
    def listed_tiles(self) -> int:
        """Those of both that call-time data lists."""
        return self.visited.listed - self.visited.columns

    @property
    def column_steps(self) -> int:
        """Steps of gathered columns."""
        return self.visited.columns

    @property
    def visited_tiles(self) -> int:
        """Key tiles that are computed, a step of gathered columns counted as one, and of the Hopper
        kernel the narrower first tile of every item too."""
        return self.visited.steps + (0 if self.cut is None else self.visited.items)

    @property
    def visited_pairs(self) -> int:
        """(query, key) pairs of the tiles that are computed."""
        return self.tile[0] * (self.tile[1] * self.visited.steps + self.visited.first)

    @property
    def positions(self) -> int:
        """Query positions of a tile."""
        return self.tile[0] if self.cut is None else self.cut.config.span

    @property
    def wasted(self) -> float | None:
        """Share of the pairs in visited tiles that are dead; None where live pairs are unknown."""
        pairs = self.visited_pairs
        return None if self.live_pairs is None or not pairs else 1 - self.live_pairs / pairs

    @property
    def flops(self) -> int | None:
        """Operations on live pairs: 2 a head dimension for the scores, 2 for the output."""
        call = self.call
        return None if self.live_pairs is None else \
            2 * (call.head_dim + call.value_dim) * self.live_pairs

    @property
    def visited_flops(self) -> int:
        """Operations on all pairs of the tiles that are computed."""
        return 2 * (self.call.head_dim + self.call.value_dim) * self.visited_pairs

    @property
    def tile_speedup(self) -> float:
        """Pairs in tiles of dense causal attention for each pair in tiles visited: the speed-up to
        expect where tiles decide; infinite where none is visited."""
        rows, shape = self.positions, self.shape
        causal = sum(-(-max(0, min(shape.kv_len, shape.q_offset + min(r + rows, shape.q_len)))
                       // self.tile[1]) for r in range(0, shape.q_len, rows))
        pairs = self.call.batch * self.call.heads * causal * rows * self.tile[1]
        return pairs / self.visited_pairs if self.visited_pairs else math.inf

    @property
    def speedup(self) -> float | None:
        """Predicted time of dense causal attention over the predicted time of the call."""
        if self.prediction is None or self.dense is None:
            return None
        return self.dense.ms / self.prediction.ms

    @property
    def graph(self) -> nx.DiGraph:
        """Expression nodes -> pieces -> loops -> kernel, of all kinds of heads."""
        graph = nx.DiGraph()
        for i, kind in enumerate(self.kinds):
            one = kind.plan.graph
            names = {node: f"{node} (heads {i})" for node in one
                     if len(self.kinds) > 1 and one.nodes[node].get("kind") != "expression"}
            names.pop("kernel", None)
            graph = nx.compose(graph, nx.relabel_nodes(one, names))
        return graph

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, texts, lists and dicts, ready for `json.dumps`."""
        return as_dict(self)

    def markdown(self) -> str:
        """The table for a Markdown page."""
        return markdown(self.table())

    def table(self) -> Table:
        """(label, lines of text) of everything there is to say."""
        return table_of(self)

    def __str__(self) -> str:
        return text(self.table())

    def __rich__(self) -> Any:
        """What the `rich` package prints."""
        return rich_table(self.table())

    def _repr_html_(self) -> str:
        return html(self.table())


def explain_call(request: Request) -> Explanation:
    """Count what one call visits and predict its time."""
    shape, call, mask = request.shape, request.call, request.mask
    works, cut = count_request(request)
    visited, pairs = total_visited(works), total_pairs(works)
    laws: list[str] = []
    simplify(request.written, laws)
    lists = sort_atoms(mask)
    prediction = dense = crossover = None
    why, no_crossover = request.no_rates, "at a length that was not looked for"
    if request.rates is not None and not is_traceable(mask):
        why = "the mask holds a function that cannot be compiled into the kernel"
    elif request.rates is not None and lists.listed and request.data is None:
        names = ", ".join(map(repr, lists.atoms))
        why = f"{names} decides, and its data was not given" if len(lists.atoms) == 1 else \
            f"{names} decide, and their data was not given"
    elif request.rates is not None:
        prediction = predict_call(request, works)
        there = request.dense_rates or request.rates
        dense = forecast_dense(there, shape, call)
        no_crossover = refuse_crossover(mask)
        crossover = None if no_crossover else find_crossover(mask, request.rates, call, there)
        no_crossover = no_crossover or ("" if crossover else "at no length up to 131,072 tokens")
    several = call.batch * call.heads
    packed = 1 if cut is None else cut.config.heads_packed
    return Explanation(
        mask=repr(mask), written=repr(request.written), laws=tuple(dict.fromkeys(laws)),
        backend=request.backend, why=request.why, kernel=request.kernel, refused=request.refused,
        shape=shape, call=call, tile=request.tile, cut=cut,
        pieces=describe_kinds(works), sieved=any(w.plan.sieve is not None for w in works),
        live_pairs=pairs, closed_form=describe_closed(mask), kinds=works, visited=visited,
        all_tiles=several // packed * -(-shape.q_len // (request.tile[0] // packed))
        * -(-shape.kv_len // request.tile[1]),
        mask_bytes=None if lists.atoms else 0,
        output_bytes=ITEM_BYTES * several * call.value_dim * shape.q_len,
        input_bytes=memory_bytes(shape, call) - ITEM_BYTES * several * call.value_dim * shape.q_len,
        dense_bytes=shape.q_len * shape.kv_len, slots=tuple(map(repr, lists.atoms)),
        counted=request.data is not None,
        is_dense=pairs == several * count_pairs(Causal(), shape) and pairs > 0,
        prediction=prediction, no_prediction=why, dense=dense, crossover=crossover,
        no_crossover=no_crossover)


def count_request(request: Request) -> tuple[tuple[KindWork, ...], HopperCut | None]:
    """The work of every kind of head, and how the Hopper kernel cuts it where that is counted."""
    mask, shape, call = request.mask, request.shape, request.call
    if request.kernel == HOPPER:
        assert request.rates is not None  # an item too long is cut by the chip's size
        return count_hopper(mask, shape, call, request.rates.processors)
    return count_work(mask, request.tile, shape, call, request.data, widen=request.widen), None


def predict_call(request: Request, works: tuple[KindWork, ...]) -> Prediction:
    """The prediction, with the steps counted anew: the chip's kernel may be another than here."""
    call, pairs = request.call, total_pairs(works)
    assert request.rates is not None
    found = forecast(request.mask, request.rates, request.shape, call, request.data,
                     request.chosen, request.estimator).prediction
    operations = 2 * (call.head_dim + call.value_dim)
    return replace(found, live_tflop=None if pairs is None else operations * pairs / 1e12)


def describe_kinds(works: tuple[KindWork, ...]) -> tuple[str, ...]:
    """A line for each piece of each kind of head."""
    return tuple(f"{f'{name_heads(work)}: ' if len(works) > 1 else ''}{describe_piece(piece)}"
                 for work in works for piece in work.plan.pieces)


def describe_closed(mask: Mask) -> str:
    """Live pairs of a square call of N tokens as a polynomial, a line for each kind of head that
    has one; "" where there is none, or where the mask ends before it holds."""
    lines = []
    limit = min((x for node in mask.walk() if (x := node.limit()) is not None), default=math.inf)
    kinds = group_heads(mask)
    for heads, one in kinds:
        if not is_traceable(one) or sort_atoms(one).atoms:
            continue
        closed = count_closed(base_of(one))
        if closed is not None and closed.valid_from <= limit:
            head = f"{format_heads(heads)}: " if len(kinds) > 1 else ""
            lines.append(f"{head}{closed.pairs} pairs for N tokens, N >= {closed.valid_from}")
    return "\n".join(lines)
