"""The modules beneath an owner, looked up without running anything."""

from __future__ import annotations

import types
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from regwrap.graph.classes import is_made_here

ABSENT = object()
Token = tuple[object, ...]


def look_up(module: nn.Module, name: str) -> object:
    """What `module.name` would give, with descriptors as they are; nothing of the user's runs."""
    own = vars(module)
    found = ABSENT
    for klass in type(module).__mro__:
        if name in klass.__dict__ and not is_made_here(klass):
            found = klass.__dict__[name]
            break
    if found is not ABSENT and hasattr(type(found), "__set__"):
        return found
    if name in own:
        return own[name]
    if found is not ABSENT:
        return found
    for table in ("_parameters", "_buffers", "_modules"):
        if name in own.get(table, ()):
            return own[table][name]
    return ABSENT


def is_indexed(module: nn.Module) -> bool:
    """Whether items are reached by index or key: what is beneath has no name of its own."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)


def _body_of(module: nn.Module) -> object:
    return look_up(module, "forward")


_BODILESS = (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


def has_body(module: nn.Module) -> bool:
    """Whether a module has a forward of its own: a ModuleList has none."""
    return not any(_body_of(module) is f for f in _BODILESS)


def is_stock_sequential(module: nn.Module) -> bool:
    """Whether what runs is the forward of `nn.Sequential`."""
    return _body_of(module) is nn.Sequential.forward


def joined(path: str, name: str) -> str:
    """The dotted path of a name beneath a path."""
    return f"{path}.{name}" if path else name


@dataclass(slots=True)
class View:
    """Looks names up beneath one owner and remembers of what kind each was.

    The tokens are the *layout* that an analysis holds for: an owner of the same class for which
    they come out equal gets the same analysis.
    """

    owner: nn.Module
    seen: dict[tuple[str, str], Token] = field(default_factory=dict)

    def module(self, path: str) -> nn.Module:
        """The module at a path from the owner."""
        found: Any = self.owner
        for name in path.split(".") if path else ():
            # in the object's __dict__ alone: a back-reference to its parent
            found = found._modules[name] if name in found._modules else vars(found)[name]
        return cast(nn.Module, found)

    def look(self, path: str, name: str) -> object:
        """What a module has under a name, found without running anything; remembered."""
        found = look_up(self.module(path), name)
        self.seen[path, name] = _token(found)
        return found

    def items(self, path: str) -> list[str]:
        """The paths of what an indexed container holds, or of everything just beneath."""
        names = list(self.module(path)._modules)
        self.seen[path, "*"] = tuple(names)
        return [joined(path, n) for n in names if isinstance(self.look(path, n), nn.Module)]

    def fits(self, tokens: Mapping[tuple[str, str], Token]) -> bool:
        """Whether another owner has the same under the names looked up."""
        return all(self._now(path, name) == token for (path, name), token in tokens.items())

    def _now(self, path: str, name: str) -> Token | None:
        try:
            module = self.module(path)
        except KeyError:
            return None
        if not isinstance(module, nn.Module):
            return None
        return tuple(module._modules) if name == "*" else _token(look_up(module, name))


def _token(found: object) -> Token:
    if isinstance(found, nn.Module):
        return ("module", weakref.ref(type(found)), "forward" in vars(found))
    if isinstance(found, torch.Tensor):
        return ("tensor",)
    if found is ABSENT:
        return ("absent",)
    if isinstance(found, types.FunctionType):
        return ("function", weakref.ref(found))
    if isinstance(found, types.BuiltinFunctionType):
        return ("builtin", getattr(found, "__qualname__", ""))
    return ("value", callable(found))
