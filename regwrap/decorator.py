"""The class decorator: every instance is regularized when its outermost `__init__` ends."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from regwrap import identity, planning, record, surgery
from regwrap.errors import PolicyError, UnmatchedRule
from regwrap.penalty import RegularizedMixin
from regwrap.record import HOOK, Pending
from regwrap.terms import L2SP

C = TypeVar("C", bound=type[nn.Module])

_LAYER = "_regwrap_rules"
_WRAPPED = "_regwrap_wrapped"
_building = threading.local()


def regularized(rules: Any, *, strict: bool = True) -> Callable[[C], C]:
    """Regularizes every instance of the class, and of its subclasses, by rules.

    The same class object comes back. A subclass that is decorated too adds its rules after those of
    its base. A rule that reaches nothing yet, because its layers are made later, waits until the
    first forward or the first read of the policy or of `reg_loss`.

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
    if not callable(rules):
        _check(rules)

    def decorate(cls: C) -> C:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(
                f"@regularized decorates a class of nn.Module, not {cls!r}; for an object write "
                "regwrap.regularize(model, rules)."
            )
        setattr(cls, _LAYER, (rules, strict))
        _wrap_own(cls)
        _cover_subclasses(cls)
        return cls

    return decorate


def _check(rules: object) -> None:
    for _, term in planning.parse_rules(rules):
        if isinstance(term, L2SP) and term.reference is None:
            raise PolicyError(
                f"{term!r} under @regularized would pull toward random weights: they are loaded "
                "after __init__; give reference= a state_dict or a model."
            )


def _wrap_own(cls: type[nn.Module]) -> None:
    """Wraps the class's initializers, unless they are inherited and wrapped already.

    A dataclass gets its `__init__` after its bases are covered; its `__post_init__` ends it.
    """
    if not hasattr(cls.__init__, _WRAPPED):
        cls.__init__ = _wrapper(cls.__init__)  # type: ignore[method-assign]
    post = cls.__dict__.get("__post_init__")
    if post is not None and not hasattr(post, _WRAPPED):
        cls.__post_init__ = _wrapper(post)  # type: ignore[attr-defined]


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

    Lightning's `save_hyperparameters` walks up the frames of `__init__` as long as they have a
    `__class__`; without one it would stop here and miss the arguments of a subclass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


def _wrapper(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        __class__ = _Frame  # noqa: F841
        depths = _depths()
        depths[id(self)] = depths.get(id(self), 0) + 1
        try:
            init(self, *args, **kwargs)
        except BaseException:
            depths.pop(id(self), None)
            raise
        depths[id(self)] = depths.get(id(self), 1) - 1
        if depths[id(self)] == 0:
            del depths[id(self)]
            _carry_out(self, 0)

    setattr(wrapped, _WRAPPED, True)
    return wrapped


def _depths() -> dict[int, int]:
    """How many initializers of each object are running in this thread."""
    if not hasattr(_building, "depths"):
        _building.depths = {}
    depths: dict[int, int] = _building.depths
    return depths


def _layers(cls: type) -> list[tuple[Any, bool]]:
    """The rules of the class, those of its bases first."""
    return [c.__dict__[_LAYER] for c in reversed(cls.__mro__) if _LAYER in c.__dict__]


def _carry_out(model: nn.Module, done: int, *, wait: bool = True) -> None:
    """Carries out the layers of rules after the first `done`; what reaches nothing yet waits."""
    for i, (rules, strict) in enumerate(_layers(type(model))[done:], done):
        told = rules(model) if callable(rules) else rules
        _check(told)
        try:
            draft = planning.draft(model, told, strict=strict or wait)
        except UnmatchedRule:
            if not wait:
                raise
            _wait(model, i)
            return
        surgery.apply(model, draft)


def _wait(model: nn.Module, done: int) -> None:
    record.write(model, record.waiting(model, Pending(done, settle)))
    model._forward_pre_hooks[HOOK] = _settle_at_forward
    identity.splice(model, RegularizedMixin)


def settle(model: nn.Module) -> None:
    """Carries out what waits on the model, or raises what keeps it from it."""
    pending = record.read(model).pending
    assert pending is not None
    _carry_out(model, pending.done, wait=False)
    model._forward_pre_hooks.pop(HOOK, None)
    record.write(model, record.waiting(model, None))


def _settle_at_forward(model: nn.Module, args: Any) -> None:
    if record.read(model).pending is not None:
        settle(model)
