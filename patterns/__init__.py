"""Published attention patterns as mask expressions. Imported as `maskdsl.patterns`.

Every function is a pure function of plain numbers and returns an ordinary mask, to be composed
further: `streaming_llm(4, 2044) | Vertical([100, 200])`.
"""

if __name__ != "maskdsl.patterns":
    raise ImportError(f"import maskdsl.patterns, not {__name__}: the folder is a part of maskdsl")

from maskdsl.patterns.classic import (
    bigbird,
    chunked,
    dilated_window,
    longformer,
    longnet,
    prefix_lm,
    sliding_window,
    sparse_transformer_fixed,
    sparse_transformer_strided,
    streaming_llm,
    tri_shape,
)
from maskdsl.patterns.estimate import vertical_slash
from maskdsl.patterns.estimate_blocks import block_topk, flex_prefill, xattention
from maskdsl.patterns.policy import LayerPolicy, minference, published_triangle_mix, triangle_mix
from maskdsl.patterns.trianglemix import triangle

__all__ = [
    "LayerPolicy", "bigbird", "block_topk", "chunked", "dilated_window", "flex_prefill",
    "longformer", "longnet", "minference", "prefix_lm", "published_triangle_mix", "sliding_window",
    "sparse_transformer_fixed", "sparse_transformer_strided", "streaming_llm", "tri_shape",
    "triangle", "triangle_mix", "vertical_slash", "xattention",
]
