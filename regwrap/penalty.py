"""`reg_loss`: the penalties that lie on a model, computed from its live tensors at every read."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regwrap import identity, record, sites
from regwrap.errors import RegwrapWarning
from regwrap.record import Factor, Mark, Record, Reference
from regwrap.terms import WeightTerm


def reg_loss(model: nn.Module) -> Tensor:
    """The sum of all penalties of a model or a part of it, always from the live weights.

    The same in training and in eval; frozen parameters do not count. Works on DDP, FSDP2 and
    `torch.compile` wrappers too.

    Returns:
        A differentiable 0-dim tensor on the parameters' device, float32 or wider; zero where
        nothing acts.
    """
    root = settled(model)
    total = functools.reduce(_add, (live.value() for live in _unnamed(root)), None)
    return _zero(root) if total is None else total


def penalties(model: nn.Module, *, attached: bool = False) -> dict[str, Tensor]:
    """The penalties site by site, keyed `"<path>.<parameter>"`; their sum is `reg_loss`.

    A frozen parameter is listed with zero.

    Args:
        model: with a policy, or a part of one.
        attached: lists what an optimizer carries too (`attach`), which `reg_loss` leaves out.
    """
    root = settled(model)
    first = _first_names(root)
    found: dict[str, Tensor] = {}
    for live in _live(root, root.named_modules(), attached=attached):
        path = first.get(id(live.tensor), live.path)
        value = live.value() if live.counts else _zero(root)
        found[path] = _add(found.get(path), value)
    return found


def weights(root: nn.Module) -> dict[str, Tensor]:
    """Every weight that a penalty acts on, in the loss or in a step, keyed as in `penalties`."""
    first = _first_names(root)
    every = _live(root, root.named_modules(), attached=True)
    return {first.get(id(live.tensor), live.path): live.tensor for live in every}


def _first_names(root: nn.Module) -> dict[int, str]:
    """Of every parameter its first name; without those inside parametrizations, no sites."""
    names: dict[int, str] = {}
    for node in sites.nodes(root):
        for name in sites.parameter_names(node.module):
            own = sites.own(node.module, name)
            if own is not None:
                names.setdefault(id(own), f"{node.path}.{name}" if node.path else name)
    return names


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b.to(a.device)


def _zero(root: nn.Module) -> Tensor:
    own = [p for p in root.parameters() if not sites.is_lazy(p)]
    wide = any(p.dtype in (torch.float64, torch.complex128) for p in own)
    device = own[0].device if own else None
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class Live:
    """A weight term with the tensor that it reads now."""

    path: str
    term: WeightTerm
    tensor: Tensor
    reference: Reference | None
    counts: bool
    """False for a frozen parameter."""
    factor: Factor | None = None
    """Of a schedule."""

    def value(self) -> Tensor:
        """The penalty, as a plain tensor also where the weight is distributed."""
        reference = None if self.reference is None else self.reference.beside(self.tensor)
        value = self.term.value(self.tensor, reference)
        if self.factor is not None:
            value = value * self.factor.tensor.to(value)
        # A DTensor's sum is partial on each rank; this gives the whole, with the right gradient.
        return value.full_tensor() if hasattr(value, "full_tensor") else value


def _unnamed(root: nn.Module) -> Iterator[Live]:
    found = [module for module in root.modules() if record.read(module).marks]
    _notice_lost(root, found)
    return (live for live in _live(root, (("", m) for m in found)) if live.counts)


def _live(
    root: nn.Module, modules: Iterable[tuple[str, nn.Module]], *, attached: bool = False
) -> Iterator[Live]:
    """Every weight term in force, once for a tensor that has several names."""
    seen: dict[tuple[object, ...], int] = {}
    found: list[tuple[Live, int]] = []
    for path, module in modules:
        held = record.read(module)
        for mark in held.marks:
            if not isinstance(mark.term, WeightTerm):
                continue
            if held.is_carried(mark) and not attached:
                continue
            live = _look(path, module, mark, held)
            if live is None:
                continue
            key = (*_identity(module, mark.site), mark.term.family)
            before = seen.get(key)
            if before is None:
                seen[key] = len(found)
                found.append((live, mark.rule.order))
            elif mark.rule.order >= found[before][1]:  # tied since: the later rule holds
                found[before] = (live, mark.rule.order)
    return (live for live, _ in found)


def _identity(module: nn.Module, site: str) -> tuple[object, ...]:
    own = sites.own(module, site)
    return (id(own),) if own is not None else (id(module), site)


def _look(path: str, module: nn.Module, mark: Mark, held: Record) -> Live | None:
    stored = sites.stored(module, mark.site)
    if any(sites.is_lazy(t) for t in stored):
        return None
    counts = not stored or not all(_is_frozen(t) for t in stored)
    tensor = stored[0] if not counts else sites.read(module, mark.site)
    if tensor is None:
        return None
    full = f"{path}.{mark.site}" if path else mark.site
    assert isinstance(mark.term, WeightTerm)
    reference = held.references.get(mark.site)
    return Live(full, mark.term, tensor, reference, counts, held.factor(mark))


def _is_frozen(tensor: Tensor) -> bool:
    # Only parameters: under vmap what functional_call puts in their place asks for no gradient.
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _notice_lost(root: nn.Module, found: list[nn.Module]) -> None:
    census = record.read(root).census
    lost = 0 if census is None else census.lost(root, found)
    if lost:
        warnings.warn(
            f"Modules of {type(root).__name__} that had a policy have been replaced since "
            f"regularize ({lost} of them): their penalties and dropouts are gone; "
            "call regularize again.",
            RegwrapWarning,
            stacklevel=4,
        )


def settled(model: nn.Module) -> nn.Module:
    """The module inside a wrapper, with the rules that waited for its layers carried out."""
    root = sites.unwrap(model)
    settle(root)
    return root


def settle(root: nn.Module) -> None:
    """Carries out rules that wait for layers made after `__init__`."""
    for module in list(root.modules()):
        pending = record.read(module).pending
        if pending is not None:
            pending.settle(module)


def warn_of_own_reg_loss(root: nn.Module) -> None:
    """Says where the penalties of a model are whose `reg_loss` is something else."""
    warnings.warn(
        f"{type(root).__name__} has a reg_loss of its own, which it keeps; read the penalties with "
        "regwrap.reg_loss(model).",
        RegwrapWarning,
        stacklevel=5,
    )


class RegularizedMixin:
    """Spliced into the class of a regularized root: `reg_loss`, and a pickle by the plain class."""

    __jit_unused_properties__ = ("reg_loss",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the `__init_subclass__` of the model's author from seeing the spliced class."""

    @property
    def reg_loss(self) -> Tensor:
        """The sum of all penalties, from the live weights; see `regwrap.reg_loss`."""
        assert isinstance(self, nn.Module)
        if "reg_loss" in self.__dict__:
            return self.__dict__["reg_loss"]  # type: ignore[no-any-return]
        try:
            return reg_loss(self)
        except AttributeError as error:
            # nn.Module.__getattr__ would turn it into "no attribute 'reg_loss'"
            raise RuntimeError(f"reg_loss could not be computed: {error}") from error

    @reg_loss.setter
    def reg_loss(self, value: Any) -> None:
        """What the model's own code assigns under the name holds from then on."""
        assert isinstance(self, nn.Module)
        if "reg_loss" not in self.__dict__:
            warn_of_own_reg_loss(self)
        self.__dict__["reg_loss"] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        make, args, *rest = reduced
        plain = identity.plain_class(type(self), RegularizedMixin)
        make, *args = (plain if part is type(self) else part for part in (make, *args))
        kept = _lift_all(self)
        if rest and rest[0] is not None:
            rest[0] = _State(rest[0], kept)
            kept = {}
        return (_rebuild, (make, tuple(args), kept), *rest)

    def __setstate__(self, state: Any) -> None:
        """Completes the model's own `__setstate__`, which may drop what it does not know."""
        kept: dict[str, dict[str, Any]] = {}
        if isinstance(state, _State):
            state, kept = state.plain, state.kept
        super().__setstate__(state)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        _lay_all(self, kept)

    def regwrap_deepcopy(self, memo: dict[int, Any]) -> Any:
        """Completes the model's own `__deepcopy__`, which may drop what it does not know."""
        kept = copy.deepcopy(_lift_all(self), memo)
        copied = super().__deepcopy__(memo)  # type: ignore[misc]
        identity.splice(copied, RegularizedMixin)
        _lay_all(copied, kept)
        return copied


@dataclass(frozen=True, eq=False)
class _State:
    """A root's pickled state by its own rules, and what lies on its modules."""

    plain: Any
    kept: dict[str, dict[str, Any]]


def _lift_all(root: Any) -> dict[str, dict[str, Any]]:
    lifted = ((path, record.lift(module)) for path, module in root.named_modules())
    return {path: kept for path, kept in lifted if kept}


def _lay_all(root: nn.Module, kept: dict[str, dict[str, Any]]) -> None:
    for path, module in root.named_modules():
        if path in kept and not record.lift(module):
            record.lay(module, kept[path])


def _rebuild(
    make: Callable[..., nn.Module], args: tuple[Any, ...], kept: dict[str, dict[str, Any]]
) -> nn.Module:
    """What unpickling calls: the plain object, its class spliced again."""
    root = make(*args)
    identity.splice(root, RegularizedMixin)
    if kept:
        _lay_all(root, kept)
    return root
