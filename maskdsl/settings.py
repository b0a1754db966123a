"""The few settings that come from the environment.

MASKDSL_DEBUG      0..4; 1 cache and compile lines, 2 timings and tile counts, 3 passes, 4 kernels
MASKDSL_CACHE_DIR  where emitted kernels are kept; default: the user's cache directory
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import platformdirs


def debug_level() -> int:
    """The value of MASKDSL_DEBUG, 0 when unset or not a number."""
    text = os.environ.get("MASKDSL_DEBUG", "0")
    return int(text) if text.isdigit() else 0


def debug(level: int, message: str) -> None:
    """Print one line to stderr when MASKDSL_DEBUG is at least `level`."""
    if debug_level() >= level:
        print(f"maskdsl: {message}", file=sys.stderr)


def cache_dir() -> Path:
    """The directory that holds emitted kernels (not created here)."""
    chosen = os.environ.get("MASKDSL_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("maskdsl"))
