"""FlexAttention, which is part of torch: by default, and with the best of some settings."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.cases import Case, Pattern
from benchmarks.measure import time_ms
from benchmarks.peers import Peer, Prepared, Tensors, build_twice

BLOCK = 128  # of create_block_mask, its default
COMPILED_FROM = 32768  # tokens; above, the eager mask would not fit into memory


def mask_mod(pattern: Pattern, length: int) -> Any:
    """The pattern as a mask_mod."""
    sink, window, last = pattern.sink, pattern.window, pattern.last

    def dense(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def union(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & ((k < sink) | (q - k < window) | (q >= length - last))

    return dense if window is None else union


class FlexDefault(Peer):
    """FlexAttention with the settings it chooses."""

    key, name = "flex", "FlexAttention default"
    module = "torch.nn.attention.flex_attention"

    def expresses(self, pattern: Pattern) -> bool:
        return True

    def ready(self, case: Case, tensors: Tensors, deadline: float) -> Prepared:
        return self.prepared(case, tensors, None)

    def prepared(self, case: Case, tensors: Tensors,
                 options: dict[str, int] | None, tables: Any = None) -> Prepared:
        """A call with these kernel options (and tables, if they are there already)."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        n = case.length
        mod = mask_mod(case.pattern, n)
        ms = first = None
        if tables is None:
            tables, ms, first = build_twice(lambda: create_block_mask(
                mod, None, None, n, n, device=tensors[0].device, _compile=n > COMPILED_FROM))
        torch._dynamo.reset()
        flex = torch.compile(flex_attention, dynamic=False)
        blocks = int(tables.kv_num_blocks.sum())
        if tables.full_kv_num_blocks is not None:
            blocks += int(tables.full_kv_num_blocks.sum())
        return Prepared(
            lambda: flex(*tensors, block_mask=tables, enable_gqa=True, kernel_options=options),
            mask_ms=ms, mask_first_s=first, visited=blocks * BLOCK * BLOCK * case.heads,
            settings=str(options or ""), tables=tables)


class FlexTuned(FlexDefault):
    """FlexAttention with the fastest of forward.SETTINGS.

    All of them are tried for the first long case of a pattern and head size, as far as the time
    limit lets; other lengths take the winner. Short calls, which only check the result, try none.
    """

    key, name = "flex-tuned", "FlexAttention tuned"

    def __init__(self) -> None:
        self.best: dict[tuple[Pattern, int], dict[str, int]] = {}

    def ready(self, case: Case, tensors: Tensors, deadline: float) -> Prepared:
        from benchmarks.forward import SETTINGS

        found = self.best.get((case.pattern, case.dim))
        if found is None and case.length < COMPILED_FROM:
            found = SETTINGS[1]
        if found is not None:
            return self.prepared(case, tensors, found)
        times: list[tuple[float, dict[str, int]]] = []
        tables = ms = first = None
        for options in filter(None, SETTINGS):
            if times and time.monotonic() > deadline:
                break
            try:
                made = self.prepared(case, tensors, options, tables)
                if tables is None:
                    tables, ms, first = made.tables, made.mask_ms, made.mask_first_s
                times.append((time_ms(made.run, repeat_ms=50), options))
            except Exception as error:  # one setting that does not fit must not hide the others
                print(f"FlexAttention {options}: {type(error).__name__}", flush=True)
        if not times:
            raise RuntimeError("no setting ran")
        best = min(times, key=lambda pair: pair[0])[1]
        self.best[case.pattern, case.dim] = best
        made = self.prepared(case, tensors, best, tables)
        made.mask_ms, made.mask_first_s = ms, first
        made.settings += f", best of {len(times)}"
        return made
