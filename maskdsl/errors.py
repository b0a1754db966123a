"""Every mistake a user can make has its own class, and every message has three parts.

What you wrote, what is wrong with it, and what to write instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


class MaskDSLError(Exception):
    """Base of every error this package raises on purpose."""

    if TYPE_CHECKING:  # dynamo raises, and tells, what Exception itself makes: no __init__ of ours
        def __init__(self, wrote: str, wrong: str, instead: str) -> None: ...

    @property
    def wrote(self) -> str:
        """What was written."""
        return str(self.args[0])

    @property
    def wrong(self) -> str:
        """What is wrong with it."""
        return str(self.args[1])

    @property
    def instead(self) -> str:
        """What to write instead."""
        return str(self.args[2])

    def __str__(self) -> str:
        return f"you wrote: {self.wrote}\n  problem: {self.wrong}\n  instead: {self.instead}"


# --- the language ---------------------------------------------------------------------------


class AtomArgumentError(MaskDSLError, ValueError):
    """A size, offset or list given to an atom is not one the atom can mean something by."""


class MaskTypeError(MaskDSLError, TypeError):
    """Something that is not a mask stands where a mask is needed."""


class AmbiguousTruthError(MaskDSLError, TypeError):
    """A mask was used as a truth value: `and`, `or`, `not`, `if`, or a chained comparison."""


class SerializationError(MaskDSLError, ValueError):
    """A mask cannot be written as text, or a text is not a mask."""


class ExpressionError(MaskDSLError, ValueError):
    """A text is not a mask expression: bad syntax, an unknown name, or more than an expression."""


class TraceError(MaskDSLError, TypeError):
    """A mask_mod did something with its indices that cannot be compiled."""


# --- the call -------------------------------------------------------------------------------


class ShapeError(MaskDSLError, ValueError):
    """Lengths, offsets or tensor shapes do not fit together."""


class RankError(ShapeError):
    """q, k or v is not a four-dimensional tensor."""


class HeadCountError(ShapeError):
    """The number of query heads is not a whole multiple of the number of key/value heads."""


class HeadDimError(ShapeError):
    """The head dimensions of q, k and v do not fit, or are outside 16..256."""


class LengthError(ShapeError):
    """The sequence is longer than the mask is defined for."""


class LayoutError(ShapeError):
    """Unknown layout name, or a tensor whose last dimension is not contiguous."""


class DtypeError(MaskDSLError, TypeError):
    """q, k and v have different dtypes, or one the kernels do not compute in."""


class DeviceError(MaskDSLError, ValueError):
    """q, k and v are on different devices, or on one the backend cannot run on."""


class ScaleError(MaskDSLError, ValueError):
    """The softmax scale is not a finite number >= 0."""


class UnknownSlotError(MaskDSLError, TypeError):
    """Data was given for a slot that the mask does not have."""


class MissingSlotError(MaskDSLError, TypeError):
    """The mask has a slot and the call gave no data for it."""


class SlotDataError(MaskDSLError, ValueError):
    """Call-time data of the wrong kind, shape, dtype or device, or one name for two slots."""


class ScoreModError(MaskDSLError, TypeError):
    """A score modifier with bad arguments, or a function where a named modifier is needed."""


class ScoreDataError(MaskDSLError, ValueError):
    """Call-time data of a score modifier of the wrong kind, shape, dtype or device."""


class GradientError(MaskDSLError, RuntimeError):
    """An input requires a gradient, and the mask was compiled with backward=False; or a second
    derivative was asked for."""


class BackendError(MaskDSLError, RuntimeError):
    """The backend asked for does not exist or cannot run here."""


class IntegrationError(MaskDSLError, ValueError):
    """Another library's model or call asks for something that is not supported."""


class ResourceError(MaskDSLError, RuntimeError):
    """The tile sizes asked for do not fit the device, or are not valid tile sizes."""


class PictureError(MaskDSLError, ValueError):
    """A picture that cannot be drawn: nothing in it, an unknown way to colour, no matplotlib."""


class StudyError(MaskDSLError, ValueError):
    """Layers or patterns that cannot be studied: shapes that do not fit, no data for a slot."""
