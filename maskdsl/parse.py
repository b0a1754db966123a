"""Mask expressions from text, without running any of it.

`parse("Sink(4) | Window(2048)")` reads Python's syntax with `ast` and builds the mask from a fixed
set of names. Nothing else can be named, so a text from anywhere can do no more than build a mask.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
from collections.abc import Callable
from typing import Any, NoReturn

from maskdsl import patterns
from maskdsl.atoms import Band
from maskdsl.errors import ExpressionError, MaskDSLError
from maskdsl.expr import ATOMS, Mask, from_json

LONGEST_TEXT = 20_000  # characters
LARGEST = 1 << 40  # a number on the way to a size
LONGEST_LIST = 1 << 16  # entries of a range(...)
MASK_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.BitOr: operator.or_, ast.BitAnd: operator.and_, ast.Sub: operator.sub}
NUMBER_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
EXAMPLE = "Sink(4) | Window(2048) | LastQ(64)"


def known_names() -> dict[str, Callable[..., Mask]]:
    """What a text may call: every atom, and the pattern functions that return a mask."""
    functions = {name: getattr(patterns, name) for name in patterns.__all__}
    masks = {name: f for name, f in functions.items() if inspect.isfunction(f)
             and inspect.signature(f).return_annotation in (Mask, "Mask")}
    return {**ATOMS, "Diagonal": Band, **masks}


def parse(text: str) -> Mask:
    """The mask that `text` writes: atoms and patterns by name, `|`, `&`, `~`, `-`, numbers.

    Numbers may be computed (`4 * 1024`), lists written as `[0, 64]` or `range(0, 640, 64)`; a text
    that begins with `{` is read as JSON. Functions (`Where`) have no text.
    Errors: ExpressionError, and those of the atoms for their arguments.

    >>> parse("Sink(4) | triangle(8, 512, 128) & ~Stride(2)")
    Sink(4) | (LastQ(128) | Sink(8) | Window(512)) & ~Stride(2)
    """
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_TEXT:
        raise ExpressionError(repr(text)[:60], "not the text of a mask",
                              f"up to {LONGEST_TEXT:,} characters, such as {EXAMPLE!r}")
    if text.lstrip().startswith("{"):
        return from_json(text)
    try:
        tree = ast.parse(text.strip(), mode="eval")
        value = Reader(text.strip()).read(tree.body)
    except SyntaxError as error:
        column = max(0, (error.offset or 1) - 1)
        raise ExpressionError(point_at(text.strip(), column), f"not an expression: {error.msg}",
                              EXAMPLE) from None
    except (RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, MaskDSLError):
            raise
        raise ExpressionError(text[:60], "cannot be read: too deeply nested, or not text",
                              EXAMPLE) from None
    if not isinstance(value, Mask):
        raise ExpressionError(text.strip(), f"a {type(value).__name__}, not a mask", EXAMPLE)
    return value


def point_at(text: str, column: int) -> str:
    """The text, with a caret under a column of its first line."""
    line = text.splitlines()[0]
    start = max(0, column - 60)
    return f"{line[start:start + 100]}\n           {' ' * (column - start)}^"


class Reader:
    """Builds values from the nodes of one text; refuses every node that is not listed here."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.names = known_names()

    def fail(self, node: ast.expr, wrong: str, instead: str = EXAMPLE) -> NoReturn:
        """An ExpressionError that points at the node."""
        column = node.col_offset if node.lineno == 1 else 0
        raise ExpressionError(point_at(self.text, column), wrong, instead)

    def unknown(self, node: ast.expr, name: str) -> NoReturn:
        """An ExpressionError with the names that look like the one written, or with all."""
        close = difflib.get_close_matches(name, self.names)
        self.fail(node, f"unknown name {name!r}",
                  " or ".join(close) if close else "one of " + ", ".join(sorted(self.names)))

    def read(self, node: ast.expr) -> Any:
        """The mask, number, text or list that a node writes."""
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, str, bool):
            return node.value
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.read(item) for item in node.elts]
        if isinstance(node, ast.BinOp):
            return self.join(node)
        if isinstance(node, ast.UnaryOp):
            return self.flip(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Name) and node.id in self.names:
            self.fail(node, f"{node.id} without its arguments", f"{node.id}()")
        if isinstance(node, ast.BoolOp):
            self.fail(node, "`and` and `or` ask one yes or no of a mask", "`&` and `|`")
        if isinstance(node, ast.Name):
            self.unknown(node, node.id)
        self.fail(node, f"{type(node).__name__} is not part of the language")

    def join(self, node: ast.BinOp) -> Any:
        """Two masks or two numbers with an operator between."""
        left, right = self.read(node.left), self.read(node.right)
        kind = type(node.op)
        if isinstance(left, Mask) and isinstance(right, Mask) and kind in MASK_OPERATORS:
            return MASK_OPERATORS[kind](left, right)
        if type(left) is type(right) is int and kind in NUMBER_OPERATORS:
            return self.compute(node, kind, left, right)
        self.fail(node, f"{kind.__name__} between a {type(left).__name__} and a "
                  f"{type(right).__name__}", "masks joined by | & -, or whole numbers")

    def compute(self, node: ast.BinOp, kind: type[ast.operator], left: int, right: int) -> int:
        """Arithmetic on sizes, refused where it would grow without bound."""
        if kind is ast.Pow and not (0 <= right <= 40 and abs(left) <= 1024):
            self.fail(node, "too large a power", "2 ** 20")
        if kind in (ast.FloorDiv, ast.Mod) and right == 0:
            self.fail(node, "division by zero")
        value: int = NUMBER_OPERATORS[kind](left, right)
        if abs(value) > LARGEST:
            self.fail(node, f"a number beyond {LARGEST}")
        return value

    def flip(self, node: ast.UnaryOp) -> Any:
        """~mask or -number."""
        value = self.read(node.operand)
        if isinstance(node.op, ast.Invert) and isinstance(value, Mask):
            return ~value
        if isinstance(node.op, ast.USub) and type(value) in (int, float):
            return -value
        self.fail(node, f"{type(node.op).__name__} of a {type(value).__name__}", "~mask or -number")

    def call(self, node: ast.Call) -> Any:
        """An atom, a pattern, or range(...)."""
        if not isinstance(node.func, ast.Name):
            self.fail(node, "only atoms and patterns can be called, by their bare names")
        name = node.func.id
        if name == "Where":
            self.fail(node, "a function has no text", "atoms and operators, or Python")
        if name != "range" and name not in self.names:
            self.unknown(node, name)
        if any(isinstance(arg, ast.Starred) for arg in node.args) or \
                any(keyword.arg is None for keyword in node.keywords):
            self.fail(node, "arguments must be written out, without * or **")
        args = [self.read(arg) for arg in node.args]
        named = {str(keyword.arg): self.read(keyword.value) for keyword in node.keywords}
        if name == "range":
            return self.list_range(node, args, named)
        try:
            return self.names[name](*args, **named)
        except MaskDSLError:
            raise
        except TypeError as error:
            wanted = str(inspect.signature(self.names[name])).split(" -> ")[0].replace("'", "")
            self.fail(node, str(error).replace(f"{name}.__init__()", name), f"{name}{wanted}")

    def list_range(self, node: ast.Call, args: list[Any], named: dict[str, Any]) -> list[int]:
        """range(...) as a list of bounded length."""
        if named or not 1 <= len(args) <= 3 or any(type(arg) is not int for arg in args) or \
                (len(args) == 3 and args[2] == 0):
            self.fail(node, "not a range of whole numbers", "range(0, 640, 64)")
        if len(range(*args)) > LONGEST_LIST:
            self.fail(node, f"more than {LONGEST_LIST:,} numbers", "range(0, 640, 64)")
        return list(range(*args))
