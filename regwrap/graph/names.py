"""Which names a piece of code can say."""

from __future__ import annotations

import ast
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from regwrap.graph.source import codes_within, definition_of, word_set
from regwrap.graph.verdicts import Refused

_PACKAGES = ("torch", "transformers.utils", "transformers.integrations", "math")
"""Packages whose code says no name of a user's layer."""
_RUNNERS = (
    "torch.utils.checkpoint",
    "torch._functorch.functional_call",
    "transformers.utils",
    "transformers.integrations",
)
"""Where functions call a module that they are given as a module, if at all, and none beneath it."""

INTROSPECTION = word_set(
    "children modules named_children named_modules _modules __dict__ apply get_submodule _apply "
    "vars attrgetter methodcaller eval exec globals locals gc sys"
)
FORBIDDEN = word_set("__class__ super eval exec globals locals vars dir __import__ delattr")
HARMLESS = word_set("isinstance hasattr len type id callable bool repr str print")
LIMIT = 200


@dataclass(frozen=True, slots=True)
class Names:
    """The names and strings in some code; `wide`: it may reach modules by other means."""

    names: frozenset[str]
    wide: bool

    def may_call(self, name: str) -> bool:
        """Whether the name is among them."""
        return self.wide or name in self.names


EVERYTHING = Names(frozenset(), True)
NOTHING = Names(frozenset(), False)


def spoken_by(code: types.CodeType) -> frozenset[str]:
    """Names of attributes and globals, and strings, in the code and in what it defines."""
    try:
        return _SAID[code]
    except KeyError:
        words: set[str] = set()
        for part in codes_within(code):
            words.update(part.co_names, part.co_freevars)
            for const in part.co_consts:
                items = const if isinstance(const, tuple | frozenset) else (const,)
                words.update(w for c in items if isinstance(c, str) for w in c.split(".")[:8])
        return _SAID.setdefault(code, frozenset(words))


_SAID: weakref.WeakKeyDictionary[types.CodeType, frozenset[str]] = weakref.WeakKeyDictionary()


def is_from(thing: object, packages: tuple[str, ...]) -> bool:
    """Whether a callable is defined in one of the packages."""
    name = getattr(thing, "__module__", None) or ""
    if isinstance(thing, types.BuiltinFunctionType) and not name:
        return "torch" in packages  # a method of a C type, torch.relu
    return isinstance(name, str) and any(
        name == root or name.startswith(f"{root}.") for root in packages
    )


def is_trusted(thing: object) -> bool:
    """Whether a callable is torch's or Python's own."""
    return is_from(thing, _PACKAGES)


def names_of(thing: object) -> Names:
    """What a function or class that is given a module says, with all that it names."""
    if is_trusted(thing):
        runs = is_from(thing, _RUNNERS) and not isinstance(thing, type)
        return NOTHING if runs else EVERYTHING
    words: set[str] = set()
    seen: set[int] = set()
    todo: list[object] = [thing]
    while todo:
        item = todo.pop()
        if id(item) in seen or is_trusted(item):
            continue
        seen.add(id(item))
        if len(seen) > LIMIT:
            return EVERYTHING
        if isinstance(item, type):
            todo += [v for k in item.__mro__ if not is_trusted(k) for v in vars(k).values()]
        elif functions := functions_behind(item):
            for function in functions:
                said = spoken_by(function.__code__)
                words |= said
                if said & INTROSPECTION or ("getattr" in said and _is_dynamic(function)):
                    return EVERYTHING
                todo += [v for v in globals_said(function, said) if _is_code(v)]
                if any(isinstance(v, nn.Module) for v in globals_said(function, said)):
                    return EVERYTHING
        elif callable(item):
            return EVERYTHING
    return Names(frozenset(words), False)


def _is_code(value: object) -> bool:
    return isinstance(value, types.FunctionType | type | types.MethodType)


def globals_said(function: types.FunctionType, said: frozenset[str]) -> Iterator[object]:
    """The globals of a function that these words name."""
    return (function.__globals__[n] for n in said if n in function.__globals__)


def _is_dynamic(function: types.FunctionType) -> bool:
    """Whether a function may use `getattr` with a name that is not written there."""
    try:
        tree: ast.AST = definition_of(function)
    except Refused:
        return True
    uses = sum(isinstance(n, ast.Name) and n.id == "getattr" for n in ast.walk(tree))
    return uses != sum(is_written_getattr(n) for n in ast.walk(tree))


def is_written_getattr(node: ast.AST) -> bool:
    """Whether a call is `getattr` with a name that is written there."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    )


def functions_behind(thing: object) -> list[types.FunctionType]:
    """The Python functions that a callable or descriptor may run: itself, or what it wraps."""
    found: list[types.FunctionType] = []
    todo: list[object] = [thing]
    seen: set[int] = set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, types.FunctionType):
            found.append(item)
            todo += [content_of(cell) for cell in item.__closure__ or ()]
            todo.append(item.__dict__.get("__wrapped__"))
        else:
            todo += [_static(item, name) for name in _WRAPPING if _static(item, name) is not item]
    return found


_WRAPPING = ("__func__", "__wrapped__", "fget", "fset", "func", "function")


def _static(item: object, name: str) -> object:
    if isinstance(item, property | types.MethodType | classmethod | staticmethod) or type(
        item
    ).__module__ in ("functools", "torch.jit"):
        return getattr(item, name, None)
    return None


def content_of(cell: types.CellType) -> object:
    """What a closure's cell holds; None if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


MADE = "_regwrap_rewritten"
"""Marks the subclasses that a rewrite makes; a survey sees the classes beneath them."""
