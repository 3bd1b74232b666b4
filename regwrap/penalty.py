"""`reg_loss`: the penalties that lie on a model, computed from its live tensors at every read."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regwrap import identity, record, sites
from regwrap.errors import RegwrapWarning
from regwrap.fastpath import Strength, applies, penalty_sum
from regwrap.graph import joined
from regwrap.record import Factor, Mark, Record, Reference
from regwrap.seen import SEEN, Read, Seen
from regwrap.terms import L1, L2, WeightTerm

_FAST = (L1, L2)
"""The terms that the fast path knows."""


def reg_loss(model: nn.Module) -> Tensor:
    """The sum of all penalties of a model or a part of it, always from the live weights.

    The same in training and in eval; frozen parameters do not count. Works on DDP, FSDP2 and
    `torch.compile` wrappers too.

    Returns:
        A differentiable 0-dim tensor on the parameters' device, float32 or wider; zero where
        nothing acts.
    """
    root = _inside(model)
    total = _total(_values(_unnamed(root, settle(root))))
    return _zero(root) if total is None else total


def penalties(model: nn.Module, *, attached: bool = False) -> dict[str, Tensor]:
    """The penalties site by site, keyed `"<path>.<parameter>"`; their sum is `reg_loss`.

    A frozen parameter is listed with zero.

    Args:
        model: with a policy, or a part of one.
        attached: lists what an optimizer carries too (`attach`), which `reg_loss` leaves out.
    """
    root = settled(model)
    first = first_names(root)
    found: dict[str, Tensor] = {}
    for live in _live(root.named_modules(), attached=attached):
        path = live.path if live.tensor is None else first.get(id(live.tensor), live.path)
        value = _whole(live.value()) if live.counts else _zero(root)
        found[path] = _add(found.get(path), value)
    return found


def first_names(root: nn.Module) -> dict[int, str]:
    """The path of every parameter, of a tied one its first; not what is inside parametrizations."""
    names: dict[int, str] = {}
    for node in sites.nodes(root):
        for name in sites.parameter_names(node.module):
            own = sites.plain(node.module, name)
            if own is not None:
                names.setdefault(id(own), joined(node.path, name))
    return names


def _values(lives: Iterable[Live]) -> Iterator[Tensor]:
    """The penalties, those of plain tensors by L1 and L2 as one sum."""
    together: dict[int, tuple[Tensor, list[Strength]]] = {}
    scaled: dict[tuple[float, int], Tensor] = {}
    for live in lives:
        if live.tensor is None or not live.is_plain:
            yield live.value()
            continue
        strength: Strength = live.term.strength
        if live.scheduled is not None:  # one tensor for all of equal strength: they share a bucket
            key = (live.term.strength, id(live.scheduled))
            strength = scaled.setdefault(key, live.term.strength * live.scheduled.tensor)
        _, strengths = together.setdefault(id(live.tensor), (live.tensor, [0.0, 0.0]))
        strengths[isinstance(live.term, L2)] = strength
    if together:
        tensors, strengths_of = zip(*together.values(), strict=True)
        l1, l2 = zip(*strengths_of, strict=True)
        yield penalty_sum(tensors, l1, l2)


def _total(values: Iterable[Tensor]) -> Tensor | None:
    """The sum; what is spread over ranks alike is added up there, and collected once."""
    spread: dict[object, Tensor] = {}
    for value in values:
        layout = _layout(value)
        spread[layout] = _add(spread.get(layout), value)
    return functools.reduce(_add, map(_whole, spread.values()), None)


def _layout(value: Tensor) -> object:
    """How a tensor lies on the ranks; None for a plain one."""
    mesh = getattr(value, "device_mesh", None)
    return None if mesh is None else (mesh, value.placements)  # type: ignore[attr-defined]


def _whole(value: Tensor) -> Tensor:
    # A DTensor's sum is partial on each rank; this gives the whole, with the right gradient.
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def weights(root: nn.Module) -> dict[str, Tensor]:
    """Every weight that a penalty acts on, in the loss or in a step, keyed as in `penalties`."""
    first = first_names(root)
    every = _live(root.named_modules(), attached=True)
    return {
        first.get(id(live.tensor), live.path): live.tensor
        for live in every
        if live.tensor is not None
    }


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b.to(a.device)


def _zero(root: nn.Module) -> Tensor:
    own = [p for p in root.parameters() if not sites.is_lazy(p)]
    wide = any(p.dtype in (torch.float64, torch.complex128) for p in own)
    device = own[0].device if own else None
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


class Live(NamedTuple):
    """A term with what it reads now."""

    path: str
    term: WeightTerm
    tensor: Tensor | None
    """The parameter or the effective weight; None for an output."""
    source: object
    """Equal for the same parameter under several names, or the same site of a module."""
    factors: Sequence[Tensor] = ()
    """U and V of a weight that hadamard has made a product."""
    reference: Reference | None = None
    seen: Seen | None = None
    counts: bool = True
    """False for a frozen parameter, and for a module that was not called."""
    scheduled: Factor | None = None
    share: float = 1.0
    """Of a sharded weight that counts when called: on how many of its ranks it was."""

    def value(self) -> Tensor:
        """The penalty; where the weight is distributed, so may it be."""
        value = self._unscheduled()
        if self.share != 1:
            value = value * self.share
        return value if self.scheduled is None else value * self.scheduled.tensor.to(value)

    @property
    def is_plain(self) -> bool:
        """Whether it is an L1 or L2 of a tensor that the fast path takes."""
        # strength 0: its value is to have a gradient, of zeros, as any other's
        plain = isinstance(self.term, _FAST) and self.term.strength and not self.factors
        return bool(plain) and self.tensor is not None and applies(self.tensor)

    def _unscheduled(self) -> Tensor:
        if self.tensor is None:
            assert self.seen is not None
            value = self.seen.total(self.term.family)
            assert value is not None
            return value
        if self.factors:
            assert isinstance(self.term, L1)
            return self.term.factored(*self.factors)
        reference = None if self.reference is None else self.reference.beside(self.tensor)
        return self.term.value(self.tensor, reference)


def live_terms(root: nn.Module) -> list[Live]:
    """Every term in force that counts now, with what it reads."""
    return [live for live in _live(root.named_modules()) if live.counts]


def _unnamed(root: nn.Module, modules: list[nn.Module]) -> Iterator[Live]:
    found = [module for module in modules if record.read(module).marks]
    _notice_lost(root, found)
    return (live for live in _live(("", m) for m in found) if live.counts)


def _live(modules: Iterable[tuple[str, nn.Module]], *, attached: bool = False) -> list[Live]:
    """Every weight term in force, once for a tensor that has several names."""
    found: dict[tuple[object, ...], tuple[Live, int]] = {}
    carried: set[tuple[object, ...]] = set()
    now = Read()
    for path, module in modules:
        held = record.read(module)
        left: Seen | None = module.__dict__.get(SEEN)
        if left is not None:
            left.look(now)
        for mark in held.marks:
            if not isinstance(mark.term, WeightTerm):
                continue
            if held.is_carried(mark) and not attached:
                # by whatever name: a step acts on the tensor
                carried.add((id(sites.plain(module, mark.site)), mark.term.family))
                continue
            live = _look(path, module, mark, held)
            if live is None:
                continue
            key = (live.source, mark.term.family)
            before = found.get(key)
            if before is None or (mark.rule.order, live.counts) >= (before[1], before[0].counts):
                # tied since: the later rule holds; of one rule, what was called
                found[key] = (live, mark.rule.order)
    return _agreed([live for key, (live, _) in found.items() if key not in carried])


def _agreed(lives: list[Live]) -> list[Live]:
    """What counts when called, alike on all ranks that hold a piece: each needs all the others.

    A weight counts by the share of ranks on which its module ran, which is what DDP's average of
    the gradients makes of it where each rank holds the whole.
    """
    meshes: dict[Any, list[int]] = {}
    for i, live in enumerate(lives):
        if getattr(live.term, "when", "always") == "called" and hasattr(live.tensor, "placements"):
            meshes.setdefault(live.tensor.device_mesh, []).append(i)  # type: ignore[union-attr]
    for mesh, mine in meshes.items():
        for i, share in zip(mine, _shares(mesh, [lives[i].counts for i in mine]), strict=True):
            lives[i] = lives[i]._replace(counts=share > 0, share=share)
    return lives


def _shares(mesh: Any, counts: list[bool]) -> list[float]:
    """The share of the mesh's ranks on which each is True, by one collective."""
    from torch.distributed.tensor import DTensor, Partial

    own = torch.tensor(counts, dtype=torch.float32, device=mesh.device_type)
    spread = DTensor.from_local(own, mesh, [Partial()] * mesh.ndim)
    return (spread.full_tensor() / mesh.size()).tolist()  # type: ignore[no-any-return]


def _look(path: str, module: nn.Module, mark: Mark, held: Record) -> Live | None:
    term, site = mark.term, mark.site
    assert isinstance(term, WeightTerm)
    full = joined(path, site)
    seen = module.__dict__.get(SEEN)
    moved = held.factor(mark)
    source: object = (id(module), site)
    if term.on == "output" and site == "output":
        some = seen is not None and seen.total(term.family) is not None
        return Live(f"{path}:output", term, None, source, seen=seen, counts=some, scheduled=moved)
    tensor = sites.plain(module, site)
    if tensor is not None:
        source, counts = id(tensor), not _is_frozen(tensor)
    else:
        stored = sites.stored(module, site)
        if any(map(sites.is_lazy, stored)):
            return None
        counts = not (stored and all(map(_is_frozen, stored)))
        tensor = sites.read(module, site) if counts else stored[0]
    if tensor is None or sites.is_lazy(tensor):
        return None
    called = getattr(term, "when", "always") == "always" or (seen is not None and seen.called)
    factored = mark.mechanism == "parametrization" and sites.is_factored(module, site)
    factors = sites.factors(module, site) if factored else ()
    reference = held.references.get(site)
    return Live(
        full, term, tensor, source, factors, reference, counts=counts and called, scheduled=moved
    )


def _is_frozen(tensor: Tensor) -> bool:
    # Only parameters: under vmap what functional_call puts in their place asks for no gradient.
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _notice_lost(root: nn.Module, found: list[nn.Module]) -> None:
    census = record.read(root).census
    lost = 0 if census is None else census.lost(root, found)
    if lost:
        warnings.warn(
            f"Modules of {type(root).__name__} that had a policy have been replaced since "
            f"regularize ({lost} of them): their penalties and hooks are gone; "
            "call regularize again.",
            RegwrapWarning,
            stacklevel=4,
        )


def settled(model: nn.Module) -> nn.Module:
    """The module inside a wrapper, with the rules that waited for its layers carried out."""
    root = _inside(model)
    settle(root)
    return root


def _inside(model: nn.Module) -> nn.Module:
    root = sites.unwrap(model)
    sites.refuse_fsdp1(root)
    return root


def settle(root: nn.Module) -> list[nn.Module]:
    """Carries out rules that wait for layers made after `__init__`; all modules."""
    modules = list(root.modules())
    waiting = [module for module in modules if record.read(module).pending is not None]
    for module in waiting:
        pending = record.read(module).pending
        if pending is not None:  # a module above may have carried it out
            pending.settle(module)
    return list(root.modules()) if waiting else modules


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
        make, *args = map(_plain, (make, *args))
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


def _plain(part: Any) -> Any:
    """A part of a pickle with the author's class in place of a spliced one, at any depth."""
    if isinstance(part, type) and issubclass(part, RegularizedMixin):
        return identity.plain_class(part, RegularizedMixin)
    return tuple(map(_plain, part)) if type(part) is tuple else part


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
