"""The marks of tests that need an H100 or H200."""

from __future__ import annotations

import pytest
import torch

from maskdsl.codegen.hopper import is_hopper

NEEDS_HOPPER = [pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available() or not is_hopper(), reason="needs a Hopper GPU")]
