"""What stands in a graph for what torch.fx has no node for."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import fx


@dataclass(frozen=True, slots=True)
class Ref:
    """A module of the owner (`""`: itself), not read yet, or read by a node."""

    path: str
    text: str
    node: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the owner or of a module beneath it, still to be looked up when it runs."""

    ref: Ref
    name: str
    function: object

    @property
    def text(self) -> str:
        """How the code would read it."""
        return f"{self.ref.text}.{self.name}"


@dataclass(frozen=True, slots=True)
class Global:
    """A global or something in it: `F.relu`; `value` is what it is now, for questions only."""

    text: str
    value: object


Value = Any  # fx.Node, Ref, Method, Global, a constant, a tuple or slice of them


def read(*_: object) -> NoReturn:
    """Stands in a graph for reading a global or a module; never called."""
    raise NotImplementedError


def part(*_: object) -> NoReturn:
    """Stands in a graph for source that runs as it stands; never called."""
    raise NotImplementedError


def call(*_: object, **__: object) -> NoReturn:
    """Stands in a graph for a call of something known only when it runs; never called."""
    raise NotImplementedError


def build(*_: object) -> NoReturn:
    """Stands in a graph for a list, dict or set display; never called."""
    raise NotImplementedError


def unpack(*_: object) -> NoReturn:
    """Stands in a graph for `a, b = value`; never called."""
    raise NotImplementedError


def augment(*_: object) -> NoReturn:
    """Stands in a graph for `x += y`; never called."""
    raise NotImplementedError


BINARY: dict[type[ast.AST], tuple[Callable[..., Any], str]] = {
    ast.Add: (operator.add, "+"),
    ast.Sub: (operator.sub, "-"),
    ast.Mult: (operator.mul, "*"),
    ast.Div: (operator.truediv, "/"),
    ast.FloorDiv: (operator.floordiv, "//"),
    ast.Mod: (operator.mod, "%"),
    ast.Pow: (operator.pow, "**"),
    ast.MatMult: (operator.matmul, "@"),
    ast.BitAnd: (operator.and_, "&"),
    ast.BitOr: (operator.or_, "|"),
    ast.BitXor: (operator.xor, "^"),
    ast.LShift: (operator.lshift, "<<"),
    ast.RShift: (operator.rshift, ">>"),
    ast.Lt: (operator.lt, "<"),
    ast.LtE: (operator.le, "<="),
    ast.Gt: (operator.gt, ">"),
    ast.GtE: (operator.ge, ">="),
    ast.Eq: (operator.eq, "=="),
    ast.NotEq: (operator.ne, "!="),
    ast.Is: (operator.is_, "is"),
    ast.IsNot: (operator.is_not, "is not"),
}
UNARY: dict[type[ast.AST], tuple[Callable[..., Any], str]] = {
    ast.USub: (operator.neg, "-"),
    ast.UAdd: (operator.pos, "+"),
    ast.Not: (operator.not_, "not "),
    ast.Invert: (operator.invert, "~"),
}
