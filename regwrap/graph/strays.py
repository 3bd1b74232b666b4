"""Modules that are also kept outside the tree."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from regwrap.graph.classes import functions_run, roots_of, words_of
from regwrap.graph.names import content_of, globals_said, spoken_by


@dataclass(frozen=True, slots=True)
class Above:
    """A module on the way to a layer, with its path and the layer's path from it."""

    path: str
    module: nn.Module
    child: str
    local: str
    """What the layer, or the container that holds it, is called."""
    anchor: str
    """The path from here of what has that name; `""` if that is this module or above it."""
    is_owner: bool


@dataclass(frozen=True, slots=True)
class _Stray:
    holder: type
    attribute: str
    module: nn.Module
    method: str | None

    @property
    def reason(self) -> str:
        what = f"its method {self.method}" if self.method else "it or what holds it"
        return f"{what} is also kept in `{self.attribute}` of a {self.holder.__name__}"


@dataclass(frozen=True, slots=True)
class Strays:
    """References to modules, and bound methods, that lie in attributes where no tree shows them."""

    found: Mapping[int, list[_Stray]]
    globals: tuple[tuple[type, frozenset[str]], ...]

    def doubt(self, layer: nn.Module, ways: list[Above], live: dict[type, frozenset[str]]) -> str:
        """Why a layer may be called from outside the tree, in words; `""` if it is not."""
        for stray in self.found.get(id(layer), ()):
            return stray.reason
        for way in ways:
            for stray in self.found.get(id(way.module), ()):
                if self._may_call(stray, way, live):
                    return stray.reason
        for cls, said in self.globals:
            if any(way.local in said for way in ways):
                return f"{cls.__name__} uses a module in a global variable"
        return ""

    def _may_call(self, stray: _Stray, way: Above, live: dict[type, frozenset[str]]) -> bool:
        if stray.method is not None:
            words = words_of(type(stray.module))
            return way.local in words.members.get(stray.method, frozenset())
        words = words_of(stray.holder)
        return way.local in words.said(live.get(stray.holder, frozenset()))


_EMPTIABLE = (dict, collections.OrderedDict, list, tuple, set)
_TABLES = frozenset(("_parameters", "_buffers", "_modules"))
_DEEP = 4


def strays_of(model: nn.Module) -> Strays:
    """Everything outside the tree through which a module of the model is reached."""
    inside = {id(m): m for m in model.modules()}
    seen: set[int] = set()
    found: dict[int, list[_Stray]] = {}
    for module in inside.values():
        for stray in _kept_by(module, inside, seen):
            found.setdefault(id(stray.module), []).append(stray)
    classes = {type(m) for m in inside.values()}
    spoken = tuple((c, w) for c in classes if (w := _said_with_globals(c, inside)))
    return Strays(found, spoken)


def _kept_by(module: nn.Module, inside: dict[int, nn.Module], seen: set[int]) -> Iterator[_Stray]:
    for attribute, value in vars(module).items():
        if type(value) in _EMPTIABLE and not value:
            continue
        if attribute not in _TABLES and not isinstance(value, _PLAIN):
            for item in _walk(value, _DEEP, seen):
                if isinstance(item, types.MethodType):
                    if id(item.__self__) in inside:
                        owner = cast(nn.Module, item.__self__)
                        yield _Stray(type(module), attribute, owner, item.__func__.__name__)
                elif not (attribute == "forward" and item is module):
                    for kept in cast(nn.Module, item).modules():
                        if id(kept) in inside:
                            yield _Stray(type(module), attribute, kept, None)


def _said_with_globals(cls: type, inside: Mapping[int, nn.Module]) -> frozenset[str]:
    """What code says that a class runs and that has a module of the model in a global variable."""
    live = words_of(cls).live(roots_of(words_of(cls).members))
    words: frozenset[str] = frozenset()
    for function in functions_run(cls, live):
        said = spoken_by(function.__code__)
        held = (v for v in globals_said(function, said) if isinstance(v, nn.Module))
        if any(id(m) in inside for v in held for m in v.modules()):
            words |= said
    return words


_PLAIN = (bool, int, float, str, bytes, torch.Tensor, torch.dtype, torch.device, type, type(None))


def _walk(value: object, depth: int, seen: set[int]) -> Iterator[object]:
    """Modules and bound methods that a value holds, looked for a few steps deep."""
    if isinstance(value, _PLAIN):
        return
    if isinstance(value, nn.Module | types.MethodType):
        yield value
        return
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    for item in _held(value):
        yield from _walk(item, depth - 1, seen)


def _held(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, types.FunctionType):
        return [content_of(c) for c in value.__closure__ or ()]
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        return ()
    try:
        held = list(vars(value).values())
    except TypeError:  # no __dict__
        held = []
    if type(value).__module__ == "functools":
        held += [getattr(value, n, None) for n in ("func", "args", "keywords")]
    return held
