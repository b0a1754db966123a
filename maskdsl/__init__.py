"""maskdsl: a composable sparse-attention mask language and compiler for PyTorch.

    from maskdsl import compile, Sink, Window, LastQ
    attn = compile(Sink(4) | Window(2048) | LastQ(64))
    out = attn(q, k, v)
"""

from maskdsl import errors
from maskdsl.api import Attention, compile, explain
from maskdsl.atoms import (
    Band,
    Causal,
    Chunk,
    Diagonal,
    Empty,
    FirstQ,
    Full,
    KeyRange,
    LastQ,
    PrefixLM,
    QueryRange,
    Sink,
    Window,
)
from maskdsl.capture import Layer, capture
from maskdsl.dense import dense, dense_attention
from maskdsl.dynamic import Blocks, Columns, Document, Prefix, TokenTopK, VerticalSlash
from maskdsl.errors import MaskDSLError
from maskdsl.expr import Mask, from_json
from maskdsl.flex import FlexMask, from_block_mask
from maskdsl.flex_call import flex_attention
from maskdsl.heads import PerHead
from maskdsl.indices import (
    BlockIndices,
    ColumnIndices,
    Documents,
    ListSizes,
    PrefixLengths,
    TokenIndices,
    VSIndices,
)
from maskdsl.layers import Layers, compile_layers
from maskdsl.parse import parse
from maskdsl.periodic import BlockDiagonal, Dilated, RandomBlocks, Slash, Stride, Vertical
from maskdsl.plot import plot_mask, save_picture
from maskdsl.plot_grid import plot_masks, plot_sparsity
from maskdsl.reading import from_mask_mod
from maskdsl.scores import ALiBi, Bias, RelativePosition, SinkLogits, Softcap
from maskdsl.shape import Shape
from maskdsl.simplify import simplify
from maskdsl.study import study
from maskdsl.study_result import Study
from maskdsl.version import VERSION
from maskdsl.where import Where

__version__ = VERSION

__all__ = [
    "ALiBi", "Attention", "Band", "Bias", "BlockDiagonal", "BlockIndices", "Blocks", "Causal",
    "Chunk", "ColumnIndices", "Columns", "Diagonal", "Dilated", "Document", "Documents", "Empty",
    "FirstQ", "FlexMask", "Full", "KeyRange", "LastQ", "Layer", "Layers", "ListSizes", "Mask",
    "MaskDSLError", "PerHead", "Prefix", "PrefixLM", "PrefixLengths", "QueryRange", "RandomBlocks",
    "RelativePosition", "Shape", "Sink", "SinkLogits", "Slash", "Softcap", "Stride", "Study",
    "TokenIndices", "TokenTopK", "VSIndices", "Vertical", "VerticalSlash", "Where", "Window",
    "capture", "compile", "compile_layers", "dense", "dense_attention", "errors", "explain",
    "flex_attention", "from_block_mask", "from_json", "from_mask_mod", "parse", "plot_mask",
    "plot_masks", "plot_sparsity", "save_picture", "simplify", "study",
]
