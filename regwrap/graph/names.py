"""Which names a piece of code can say."""

from __future__ import annotations

import ast
import functools
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

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


def said_by(function: types.FunctionType) -> frozenset[str]:
    """What a function's code says; `__dict__` too if `getattr` may get it any attribute."""
    said = spoken_by(function.__code__)
    if "getattr" not in said or function.__name__ == "__getattr__":  # who asks it says the name
        return said
    home = function.__globals__.get("__name__", "")  # a wrapper shows the name of what it wraps
    return said if _is_in(home, _PACKAGES) or not _is_dynamic(function) else said | {"__dict__"}


def is_from(thing: object, packages: tuple[str, ...]) -> bool:
    """Whether a callable is defined in one of the packages."""
    name = getattr(thing, "__module__", None) or ""
    if isinstance(thing, types.BuiltinFunctionType) and not name:
        return "torch" in packages  # a method of a C type, torch.relu
    return isinstance(name, str) and _is_in(name, packages)


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in packages)


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
                said = said_by(function)
                words |= said
                if said & INTROSPECTION:
                    return EVERYTHING
                todo += code_named(function, said)
                if any(isinstance(v, nn.Module) for v in globals_said(function, said)):
                    return EVERYTHING
        elif callable(item):
            return EVERYTHING
    return Names(frozenset(words), False)


_DISPLAYS = (dict, list, tuple)
_CODE = (types.FunctionType, type, types.MethodType)


def code_named(function: types.FunctionType, said: frozenset[str]) -> Iterator[object]:
    """Functions and classes that a function names: globals, in a module, of a global object."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    for value in (*globals_said(function, said), *defaults):
        if type(value) in _DISPLAYS:
            yield from functions_behind(value)
        elif isinstance(value, _CODE):
            yield value
        elif isinstance(value, types.ModuleType):
            inside = () if is_library(value.__name__) else said & vars(value).keys()
            yield from (v for n in inside if isinstance(v := vars(value)[n], _CODE))
        elif not isinstance(value, nn.Module) and not is_library(type(value).__module__):
            yield type(value)


def is_library(module: str) -> bool:
    """Whether objects of a module's classes call no layer of a model that they are handed."""
    root = module.partition(".")[0]
    return root in ("torch", "transformers", "numpy") or root in sys.stdlib_module_names


def code_kept(value: object) -> list[object]:
    """The functions and classes of what lies in an attribute, which may be handed a module."""
    if type(value) in _DISPLAYS:
        return [code for f in functions_behind(value) for code in code_kept(f)]
    if isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
        return [code for part in held for code in code_kept(part)]
    if isinstance(value, _CODE):
        return [] if is_library(value.__module__ or "") else [value]
    return [] if is_library(type(value).__module__) else [type(value)]


def globals_said(function: types.FunctionType, said: frozenset[str]) -> Iterator[object]:
    """The globals of a function that these words name."""
    return (function.__globals__[n] for n in said if n in function.__globals__)


def _is_dynamic(function: types.FunctionType) -> bool:
    """Whether a function may use `getattr` with a name that is not written there."""
    code = function.__code__
    if code not in _DYNAMIC:
        try:
            tree = definition_of(function)
        except Refused:
            return True
        uses = sum(isinstance(n, ast.Name) and n.id == "getattr" for n in ast.walk(tree))
        _DYNAMIC[code] = uses != sum(map(is_written_getattr, ast.walk(tree)))
    return _DYNAMIC[code]


_DYNAMIC: weakref.WeakKeyDictionary[types.CodeType, bool] = weakref.WeakKeyDictionary()


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
        elif type(item) in _DISPLAYS:
            todo += item.values() if isinstance(item, dict) else cast(list[object], item)
        else:
            todo += _wrapped_by(item)
    return found


_WRAPPERS = (property, types.MethodType, classmethod, staticmethod)
_WRAPPING = ("__func__", "__wrapped__", "fget", "fset", "func", "function")


def _wrapped_by(item: object) -> list[object]:
    kind = type(item)
    if not issubclass(kind, _WRAPPERS) and kind.__module__ not in ("functools", "torch.jit"):
        return []
    found = (getattr(item, name, None) for name in _WRAPPING)
    return [value for value in found if value is not None and value is not item]


def content_of(cell: types.CellType) -> object:
    """What a closure's cell holds; None if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


MADE = "_regwrap_rewritten"
"""Marks the subclasses that a rewrite makes; a survey sees the classes beneath them."""
