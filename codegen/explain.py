"""What a call costs, in numbers a user can check: pairs, tiles, memory, predicted time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from maskdsl.atoms import Causal
from maskdsl.codegen.bounds import describe_piece
from maskdsl.codegen.cost import ITEM_BYTES, Prediction, memory_bytes, predict
from maskdsl.codegen.counts import count_closed
from maskdsl.codegen.forecast import (
    find_crossover,
    forecast,
    forecast_dense,
    total_pairs,
    total_visited,
)
from maskdsl.codegen.lists import base_of, group_heads, sort_atoms
from maskdsl.codegen.rates import Rates
from maskdsl.codegen.report import Table, as_dict, html, markdown, rich_table, table_of, text
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
    tile     of the backend that runs, in tokens; chosen: the user's, or None
    data     the slots' data, checked; None: not given
    rates    of the chip to predict for; None: no prediction, and no_rates says why
    widen    gives a superset that can be planned, where a mask cannot be traced; None: none needed
    """

    mask: Mask
    written: Mask
    backend: str
    why: str
    shape: Shape
    call: CallHeads
    tile: tuple[int, int]
    chosen: tuple[int, int] | None = None
    data: Mapping[str, Any] | None = None
    rates: Rates | None = None
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
    live_pairs    (query, key) pairs the mask keeps; None where only testing could tell and there
                  are too many
    closed_form   live pairs of one head of a square call of N tokens, as text; "" where there is
                  none
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
    dense         predicted time of dense causal attention there
    crossover     shortest length, in tokens, from which the mask is predicted to be faster than
                  dense; None: not up to 128K, or not looked for
    fallback      what a layer policy would do, where one was asked; else ""
    """

    mask: str
    written: str
    laws: tuple[str, ...]
    backend: str
    why: str
    shape: Shape
    call: CallHeads
    tile: tuple[int, int]
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
        """Key tiles that are computed, a step of gathered columns counted as one."""
        return self.visited.steps

    @property
    def wasted(self) -> float | None:
        """Share of the pairs in visited tiles that are dead; None where live pairs are unknown."""
        pairs = self.visited_tiles * self.tile[0] * self.tile[1]
        return None if self.live_pairs is None or not pairs else 1 - self.live_pairs / pairs

    @property
    def flops(self) -> int | None:
        """Operations on live pairs: 2 a head dimension for the scores, 2 for the output."""
        call = self.call
        return None if self.live_pairs is None else \
            2 * (call.head_dim + call.value_dim) * self.live_pairs

    @property
    def tile_speedup(self) -> float:
        """Tiles of dense causal attention for each tile visited: the speed-up to expect."""
        rows, shape = self.tile[0], self.shape
        causal = sum(-(-max(0, min(shape.kv_len, shape.q_offset + min(r + rows, shape.q_len)))
                       // self.tile[1]) for r in range(0, shape.q_len, rows))
        return self.call.batch * self.call.heads * causal / max(1, self.visited_tiles)

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
    works = count_work(mask, request.tile, shape, call, request.data, widen=request.widen)
    visited, pairs = total_visited(works), total_pairs(works)
    laws: list[str] = []
    simplify(request.written, laws)
    lists = sort_atoms(mask)
    prediction = dense = crossover = None
    why = request.no_rates
    if request.rates is not None and not is_traceable(mask):
        why = "the mask holds a function that cannot be compiled into the kernel"
    elif request.rates is not None and lists.listed and request.data is None:
        why = f"{', '.join(map(repr, lists.atoms))} decide, and their data was not given"
    elif request.rates is not None:
        prediction = predict_call(request, works)
        dense = forecast_dense(request.rates, shape, call)
        crossover = find_crossover(mask, request.rates, call)
    several = call.batch * call.heads
    return Explanation(
        mask=repr(mask), written=repr(request.written), laws=tuple(dict.fromkeys(laws)),
        backend=request.backend, why=request.why, shape=shape, call=call, tile=request.tile,
        pieces=describe_kinds(works), sieved=any(w.plan.sieve is not None for w in works),
        live_pairs=pairs, closed_form=describe_closed(mask), kinds=works, visited=visited,
        all_tiles=several * -(-shape.q_len // request.tile[0])
        * -(-shape.kv_len // request.tile[1]),
        mask_bytes=None if lists.atoms else 0,
        output_bytes=ITEM_BYTES * several * call.value_dim * shape.q_len,
        input_bytes=memory_bytes(shape, call) - ITEM_BYTES * several * call.value_dim * shape.q_len,
        dense_bytes=shape.q_len * shape.kv_len, slots=tuple(map(repr, lists.atoms)),
        counted=request.data is not None,
        is_dense=pairs == several * count_pairs(Causal(), shape) and pairs > 0,
        prediction=prediction, no_prediction=why, dense=dense, crossover=crossover)


def predict_call(request: Request, works: tuple[KindWork, ...]) -> Prediction:
    """The prediction, with the steps counted anew where the chip's tiles are others than here."""
    rates, shape, call = request.rates, request.shape, request.call
    assert rates is not None
    found = forecast(request.mask, rates, shape, call, request.data, request.chosen,
                     request.estimator)
    lists = request.data is not None and sort_atoms(request.mask).listed
    return predict(rates, found.prediction.tile, shape, call, total_visited(found.works),
                   total_pairs(works), lists, request.estimator)


def describe_kinds(works: tuple[KindWork, ...]) -> tuple[str, ...]:
    """A line for each piece of each kind of head."""
    return tuple(f"{f'heads {i}: ' if len(works) > 1 else ''}{describe_piece(piece)}"
                 for i, work in enumerate(works) for piece in work.plan.pieces)


def describe_closed(mask: Mask) -> str:
    """Live pairs of a square call of N tokens as a polynomial; "" where there is none."""
    kinds = group_heads(mask)
    if len(kinds) > 1 or not is_traceable(mask) or sort_atoms(mask).atoms:
        return ""
    closed = count_closed(base_of(kinds[0][1]))
    return f"{closed.pairs} pairs for N tokens, N >= {closed.valid_from}" if closed else ""
