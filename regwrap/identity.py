"""Puts a mixin into the class of one object and takes it out again, beneath foreign classes.

`splice` gives the object a subclass `(mixin, cls)` that looks like `cls`: same name, module,
documentation and metaclass. A class that another tool made for this one object (a parametrized
module, `fully_shard`, a `GraphModule`) is rebuilt over ours, so that the tool finds its own class
on top, where it put it, and can take it away.
"""

from __future__ import annotations

import abc
import functools
from typing import Any

from torch import fx, nn

_LOOKS = ("__module__", "__qualname__", "__doc__")
_MADE = "_regwrap_spliced"


def is_spliced(module: nn.Module, mixin: type) -> bool:
    """Whether the mixin is in the object's class."""
    return mixin in type(module).__mro__


def splice(module: nn.Module, mixin: type) -> None:
    """Puts the mixin into the class of this one object."""
    if not is_spliced(module, mixin):
        _assign(module, _with(type(module), mixin))


def unsplice(module: nn.Module, mixin: type) -> None:
    """Takes the mixin out of the object's class, whatever has been put on top since."""
    if is_spliced(module, mixin):
        _assign(module, _without(type(module), mixin))


def plain_class(cls: type, mixin: type) -> type:
    """The class as it would be without the mixin."""
    return _without(cls, mixin)


def _assign(module: nn.Module, cls: type) -> None:
    if _is_graph_class(type(module)):
        # The class is this object's own (GraphModule makes one for each), and its generated call
        # refers to it by identity: it keeps its place, its base changes.
        type(module).__bases__ = cls.__bases__
    else:
        # Through object: a model may have a __setattr__ of its own.
        object.__setattr__(module, "__class__", cls)


def _with(cls: type, mixin: type) -> type:
    if not _is_foreign(cls):
        return _subclass(cls, mixin)
    bases = tuple(_with(b, mixin) if issubclass(b, nn.Module) else b for b in cls.__bases__)
    return _rebuilt(cls, bases)


def _without(cls: type, mixin: type) -> type:
    if mixin not in cls.__mro__:
        return cls
    if _MADE in cls.__dict__:
        return cls.__bases__[1]
    return _rebuilt(cls, tuple(_without(b, mixin) for b in cls.__bases__))


def _is_graph_class(cls: type) -> bool:
    return issubclass(cls, fx.GraphModule) and cls.__qualname__.endswith("GraphModuleImpl")


def _is_foreign(cls: type) -> bool:
    """Whether another tool made the class for one object (or, as fully_shard, one class)."""
    if _is_graph_class(cls):
        return True
    base = cls.__bases__[-1]
    made_by = {b.__name__ for b in cls.__bases__}
    parametrized = cls.__name__ == f"Parametrized{base.__name__}" and len(cls.__bases__) == 1
    return parametrized or ("FSDPModule" in made_by and cls.__name__ == f"FSDP{base.__name__}")


def _subclass(cls: type, mixin: type) -> type:
    known: type
    for known in type.__subclasses__(cls):
        if known.__dict__.get(_MADE) is mixin:
            return known
    looks = {name: cls.__dict__[name] for name in _LOOKS if name in cls.__dict__}
    body: dict[str, Any] = {**looks, "__qualname__": cls.__qualname__, _MADE: mixin}
    if hasattr(cls, "__deepcopy__"):
        body["__deepcopy__"] = mixin.regwrap_deepcopy  # type: ignore[attr-defined]
    body["__init__"] = _plain_init(cls)
    become = getattr(cls, "cls_to_become", None)
    if become is not None:  # a lazy module turns into this class at its first forward
        body["cls_to_become"] = _subclass(become, mixin)
    return _create(type(cls), cls.__name__, (mixin, cls), body)


def _plain_init(cls: type) -> Any:
    """An initializer by which `type(model)(...)` makes a plain model, as it always did."""

    @functools.wraps(cls.__init__)  # type: ignore[misc]
    def __init__(self: object, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "__class__", cls)
        cls.__init__(self, *args, **kwargs)  # type: ignore[misc]

    return __init__


def _rebuilt(cls: type, bases: tuple[type, ...]) -> type:
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return _create(type(cls), cls.__name__, bases, body)


def _create(meta: type, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
    # Not meta(...): a metaclass of the model's author may register the classes that it makes.
    make = abc.ABCMeta.__new__ if issubclass(meta, abc.ABCMeta) else type.__new__
    return make(meta, name, bases, body)
