"""Which items of a call are cut into parts: the few neighbouring ones that take far more steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

MAX_PARTS = 64


def cut_long(steps: Any, share: float, most: Callable[[Any], int]) -> tuple[int, int, int]:
    """(first, count, parts) of the tiles that take more than `share` steps, each to be cut into so
    many parts; (0, 0, 1) where there are none, more than half, or some apart from each other.

    steps  of every tile, int64[tiles]
    most   from the steps of the long tiles to the most parts each may have
    """
    long = np.flatnonzero(steps > share)
    if not long.size or long[-1] - long[0] + 1 != long.size or long.size > len(steps) // 2:
        return 0, 0, 1
    parts = min(-(-int(steps[long].max()) // int(share)), MAX_PARTS, most(steps[long]))
    return (int(long[0]), int(long.size), parts) if parts > 1 else (0, 0, 1)
