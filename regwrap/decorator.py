"""The class decorator: every instance is regularized when its outermost `__init__` ends."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from regwrap import planning, record, surgery
from regwrap.errors import PolicyError, UnmatchedRule, brief
from regwrap.record import HOOK, Pending
from regwrap.terms import L2SP, Term

C = TypeVar("C", bound=type[nn.Module])

Layer = tuple[Any, bool]
"""The rules of one decorator, or the function that makes them, and whether they are strict."""

_LAYERS = "_regwrap_rules"
_building = threading.local()
_wrappers: weakref.WeakSet[Callable[..., None]] = weakref.WeakSet()


def regularized(rules: Any, *, strict: bool = True) -> Callable[[C], C]:
    """Regularizes every instance of the class, and of its subclasses, by rules.

    The same class object comes back. A subclass that is decorated too adds its rules after those of
    its base, an upper decorator after a lower one. A rule that reaches nothing yet, because its
    layers are made later, waits until the first forward or the first read of the policy or of
    `reg_loss`.

    Args:
        rules: as for `regularize`, or a function from the finished instance to rules.
        strict: False makes a rule that reaches nothing a warning.

    Raises:
        TypeError: when the decorated object is no class of `nn.Module`, or the rules have another
            form.
        PolicyError: for `L2SP` without a reference: in `__init__` the weights are still random.
    """
    if isinstance(rules, type):
        raise TypeError(
            f"@regularized needs rules: write @regularized({{...}}) above class {rules.__name__}."
        )
    layer: Layer = (rules if callable(rules) else _checked(rules), strict)

    def decorate(cls: C) -> C:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(
                f"@regularized decorates a class of nn.Module, not {brief(cls)}; for an object "
                "write regwrap.regularize(model, rules)."
            )
        layers = cls.__dict__.get(_LAYERS, ())
        setattr(cls, _LAYERS, (*layers, layer))
        if not layers:
            _wrap_own(cls)
            for sub in _known_subclasses(cls):
                _wrap_own(sub)
            _cover_subclasses(cls)
        return cls

    return decorate


def _checked(rules: object) -> list[tuple[object, Term | None]]:
    pairs = planning.parse_rules(rules)
    for _, term in pairs:
        if isinstance(term, L2SP) and term.reference is None:
            raise PolicyError(
                f"{term!r} under @regularized would pull toward random weights: they are loaded "
                "after __init__; give reference= a state_dict or a model."
            )
    return pairs


def _wrap_own(cls: type[nn.Module]) -> None:
    """Wraps what ends the making of an instance, unless it is inherited and wrapped already."""
    post = hasattr(cls, "__post_init__")
    if post:
        _wrap(cls, "__post_init__")
    if not (post and _is_dataclass_made(cls)):
        _wrap(cls, "__init__")


def _is_dataclass_made(cls: type[nn.Module]) -> bool:
    """Whether `__init__` is inherited from a dataclass, or from nothing yet.

    Then `@dataclass` may come above us, which makes no `__init__` where it finds one.
    """
    maker = next(base for base in cls.__mro__ if "__init__" in base.__dict__)
    return maker is not cls and (maker is nn.Module or "__dataclass_fields__" in maker.__dict__)


def _wrap(cls: type[nn.Module], name: str) -> None:
    if getattr(cls, name) not in _wrappers:
        wrapper = _wrapper(cls, name)
        _wrappers.add(wrapper)
        setattr(cls, name, wrapper)


def _known_subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """Subclasses that were there before the decorator, called as a function, came."""
    for sub in type.__subclasses__(cls):
        yield sub
        yield from _known_subclasses(sub)


def _cover_subclasses(cls: type[nn.Module]) -> None:
    own = cls.__dict__.get("__init_subclass__")

    def __init_subclass__(sub: type[nn.Module], /, **kwargs: Any) -> None:
        if own is None:
            super(cls, sub).__init_subclass__(**kwargs)
        else:
            own.__get__(None, sub)(**kwargs)
        _wrap_own(sub)

    cls.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]


class _Frame:
    """Stands as `__class__` in the wrapper's frame; its signature names the wrapper's locals.

    Lightning's `save_hyperparameters` walks up the frames as long as they are of an `__init__` and
    have a `__class__`; without them it would stop here and miss the arguments of a subclass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


def _wrapper(cls: type[nn.Module], name: str) -> Callable[..., None]:
    own = cls.__dict__.get(name)

    @functools.wraps(getattr(cls, name))
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        __class__ = _Frame  # noqa: F841
        # An inherited one is looked up at each call: a subclass may put another base before it.
        init = getattr(super(cls, self), name) if own is None else functools.partial(own, self)
        depths, key = _depths(), id(self)
        if key not in depths:
            record.strip(self)  # of a former life: `model.__init__()` starts afresh
        depths[key] = depths.get(key, 0) + 1
        try:
            init(*args, **kwargs)
        finally:
            depths[key] -= 1
            outermost = not depths[key]
            if outermost:
                del depths[key]
        if outermost:
            _carry_out(self)

    return __init__


def _depths() -> dict[int, int]:
    """How many initializers of each object are running in this thread."""
    if not hasattr(_building, "depths"):
        _building.depths = {}
    depths: dict[int, int] = _building.depths
    return depths


def _layers(model: nn.Module) -> list[Layer]:
    """The rules of the model's class, those of its bases first."""
    held = (cls.__dict__.get(_LAYERS, ()) for cls in reversed(type(model).__mro__))
    return [layer for layers in held for layer in layers]


def _carry_out(model: nn.Module) -> None:
    """Carries out the layers of rules up to the one that reaches nothing yet; that one waits."""
    for done, (rules, _) in enumerate(_layers(model)):
        try:
            draft = planning.draft(model, _told(rules, model))
        except UnmatchedRule:
            record.write(model, record.waiting(model, Pending(done, settle)))
            model._forward_pre_hooks[HOOK] = _settle_at_forward
            surgery.expose(model)
            return
        surgery.apply(model, draft)


def _told(rules: Any, model: nn.Module) -> list[tuple[object, Term | None]]:
    return _checked(rules(model)) if callable(rules) else rules


def settle(model: nn.Module) -> None:
    """Carries out what waits on the model, or raises what keeps it from it."""
    pending = record.read(model).pending
    assert pending is not None
    for done, (rules, strict) in list(enumerate(_layers(model)))[pending.done :]:
        surgery.apply(model, planning.draft(model, _told(rules, model), strict=strict))
        record.write(model, record.waiting(model, Pending(done + 1, settle)))
    model._forward_pre_hooks.pop(HOOK, None)
    record.write(model, record.waiting(model, None))


def _settle_at_forward(model: nn.Module, args: Any) -> None:
    if record.read(model).pending is not None:
        settle(model)
