"""Which mask in which layer of a model: `LayerPolicy`, and TriangleMix as one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from maskdsl.atoms import Full
from maskdsl.dynamic import VerticalSlash
from maskdsl.errors import AtomArgumentError
from maskdsl.expr import Mask
from maskdsl.patterns.trianglemix import triangle

# model -> (layers, first triangle layer), as published; the layers before it stay dense
PUBLISHED = {
    "Llama-3.1-8B-Instruct": (32, 16),
    "Llama-3-8B-Instruct-262K": (32, 16),
    "Qwen2.5-7B-Instruct": (28, 20),
}


@dataclass(frozen=True, slots=True)
class LayerPolicy:
    """One mask for every layer of a model, first layer first.

    masks           the masks
    dense_fallback  True says that every mask stands for dense causal attention and only exists to
                    be faster: `compile_layers` may then run dense attention where it is predicted
                    to be no slower (short prompts, lists that cover too much). False (default):
                    the masks are meant as they are.

    Equal masks stand for one compiled kernel: `policy.kinds()` lists each with its layers.

    >>> from maskdsl.atoms import Window
    >>> policy = LayerPolicy([Full(), Window(8), Full()])
    >>> policy.kinds()
    [(Full(), (0, 2)), (Window(8), (1,))]
    """

    masks: tuple[Mask, ...]
    dense_fallback: bool = False

    def __post_init__(self) -> None:
        masks = tuple(self.masks) if isinstance(self.masks, Iterable) else ()
        if not masks or not all(isinstance(mask, Mask) for mask in masks):
            raise AtomArgumentError(f"LayerPolicy({self.masks!r})",
                                    "a list of masks is needed, one for every layer",
                                    "LayerPolicy([Full()] * 16 + [triangle()] * 16)")
        if not isinstance(self.dense_fallback, bool):
            raise AtomArgumentError(f"LayerPolicy(..., dense_fallback={self.dense_fallback!r})",
                                    "dense_fallback is True or False",
                                    "LayerPolicy(masks, dense_fallback=True)")
        object.__setattr__(self, "masks", masks)

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, layer: int) -> Mask:
        return self.masks[layer]

    def kinds(self) -> list[tuple[Mask, tuple[int, ...]]]:
        """(mask, its layers) for every distinct mask, in order of first use."""
        found: dict[Mask, list[int]] = {}
        for layer, mask in enumerate(self.masks):
            found.setdefault(mask, []).append(layer)
        return [(mask, tuple(layers)) for mask, layers in found.items()]


def choose_layers(num_layers: int, layers: Iterable[int]) -> frozenset[int]:
    """`layers` as a set of layer numbers below num_layers, or an AtomArgumentError."""
    chosen = frozenset(layers)
    bad = [layer for layer in chosen if not isinstance(layer, int) or isinstance(layer, bool)
           or not 0 <= layer < num_layers]
    if bad:
        raise AtomArgumentError(f"dense_layers with {bad[0]!r} of {num_layers} layers",
                                f"layers are numbered 0..{num_layers - 1}",
                                f"dense_layers=range({num_layers // 2})")
    return chosen


def triangle_mix(num_layers: int, dense_layers: Iterable[int], *, sparse: Mask | None = None,
                 dense: Mask | None = None, dense_fallback: bool = True) -> LayerPolicy:
    """TriangleMix: dense attention in some layers, the triangle in the others.

    num_layers    layers of the model
    dense_layers  the numbers of the layers that stay dense, from 0: any list, not only a start
    sparse        mask of the other layers; default `triangle()`, sizes 8, 512 and 128 tokens
    dense         mask of the dense layers; default `Full()`. The paper's combination with dynamic
                  sparsity is `VerticalSlash("vs")` here: MInference in the dense layers.
    dense_fallback  whether a layer may run dense attention where that is predicted to be no slower;
                  True by default, since the paper's masks stand for dense attention
    Compile each mask with causal=True, the default; `compile_layers` compiles them all.

    Source: TriangleMix, arXiv 2507.21526, section 3.

    >>> triangle_mix(4, [0, 1]).kinds()
    [(Full(), (0, 1)), (LastQ(128) | Sink(8) | Window(512), (2, 3))]
    """
    chosen = choose_layers(num_layers, dense_layers)
    here, there = Full() if dense is None else dense, triangle() if sparse is None else sparse
    return LayerPolicy(tuple(here if layer in chosen else there for layer in range(num_layers)),
                       dense_fallback)


def minference(num_layers: int, slot: str = "vs", *, dense_fallback: bool = True) -> LayerPolicy:
    """MInference: vertical-slash in every layer and head, its indices in one slot.

    dense_fallback  as in `triangle_mix`. MInference's own tables have it slower than dense
                    attention for short prompts (2.78 s against 0.98 s at 10K tokens)

    Source: MInference, arXiv 2407.02490; its released configurations use no other pattern.

    >>> minference(32).kinds()[0][0]
    VerticalSlash('vs')
    """
    if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
        raise AtomArgumentError(f"minference({num_layers!r})", "a model has one layer or more",
                                "minference(32)")
    return LayerPolicy((VerticalSlash(slot),) * num_layers, dense_fallback)


def published_triangle_mix(model: str, *, slot: str | None = None,
                           dense_fallback: bool = True) -> LayerPolicy:
    """TriangleMix as published for one of three models.

    model  Llama-3.1-8B-Instruct, Llama-3-8B-Instruct-262K (16 of 32 layers triangle each) or
           Qwen2.5-7B-Instruct (8 of 28)
    slot   with a name: MInference's vertical-slash in the dense layers, its indices in that slot
    dense_fallback  as in `triangle_mix`

    Source: TriangleMix, arXiv 2507.21526, and the released code's `starting_layer`.

    >>> len(published_triangle_mix("Qwen2.5-7B-Instruct").kinds()[0][1])
    20
    """
    if model not in PUBLISHED:
        raise AtomArgumentError(f"published_triangle_mix({model!r})", "no split was published for "
                                "this model", " or ".join(PUBLISHED) + ", or triangle_mix with "
                                "layers of your own")
    layers, start = PUBLISHED[model]
    return triangle_mix(layers, range(start), dense=VerticalSlash(slot) if slot else None,
                        dense_fallback=dense_fallback)
