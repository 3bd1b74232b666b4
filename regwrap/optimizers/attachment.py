"""Penalties that act in the optimizer's step: exact zeros, and no autograd graph."""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regwrap import penalty, record
from regwrap.errors import RegwrapWarning
from regwrap.optimizers import carriers, metrics, sharded
from regwrap.optimizers.claims import Claim, Key, claims
from regwrap.optimizers.plan import Batch, Plan, Swap
from regwrap.record import Carried
from regwrap.terms import L1, GroupLasso, number


def attach(model: nn.Module, optimizer: Optimizer) -> Attachment:
    """Lets the policy's weight penalties act in `optimizer.step()`; `reg_loss` leaves them out.

    `L2` and `L2SP` are added to the gradient before the step (under SGD the bits of
    `weight_decay`), and `.grad` is as before afterwards. `WeightDecay` is left to a group that has
    exactly its rate, and is decoupled, w *= 1 - lr * rate, where the group has none. `L1` and
    `GroupLasso` are proximal steps after it, in the optimizer's own metric: weights become exactly
    zero, at scikit-learn's solution under SGD, SGD with momentum, Adam and AdamW (see
    `regwrap.proximal`). `MaxNorm` is a projection after it. `loss + model.reg_loss` stays right:
    activity penalties, `Orthogonal`, `Penalty`, `when="called"` and hadamard stay there.

    Learning rates, strengths and groups are read at every step. A parameter whose gradient is None
    is left alone, as the optimizer leaves it. Gradient clipping sees the data gradient alone.
    A copy or a pickle of the model has its penalties back in its `reg_loss`.

    Args:
        model: with a policy; a submodule where several optimizers step its parts.
        optimizer: of the parameters of the model; accelerate's and Lightning's wrappers too.

    Raises:
        TypeError: when the optimizer is none.
        PolicyError: for an optimizer that cannot carry penalties, a trainable penalised parameter
            that it does not hold, an entry attached already, a policy without an entry for an
            optimizer. Nothing is changed then.
    """
    root = penalty.settled(model)
    stepping = carriers.unwrap(optimizer)
    carriers.refuse(stepping)
    found = claims(root, stepping)
    _warn_of_plain_threshold(found, stepping)
    return Attachment(root, stepping, found)


def _warn_of_plain_threshold(found: list[Claim], optimizer: Optimizer) -> None:
    if metrics.is_exact(optimizer) or not any(c.term.in_step == "proximal" for c in found):
        return
    name = type(optimizer).__name__
    warnings.warn(
        f"attach: the metric of {name} is not known, so that L1 and GroupLasso use the plain "
        f"threshold lr * strength: weights become exactly zero, but at another strength than under "
        f"SGD, where {name} scales its steps; tune the strength for it.",
        RegwrapWarning,
        stacklevel=3,
    )


class Attachment:
    """What `attach` returns: penalties carried by an optimizer, until `remove`.

    It keeps the optimizer, in whose step and no other the penalties are. A copy or a pickle of it
    carries nothing, as the copy of the model has its penalties back in its `reg_loss`.
    """

    def __init__(self, root: nn.Module, optimizer: Optimizer, found: list[Claim]) -> None:
        self._root = root
        self._token = object()
        self._optimizer: Optimizer | None = optimizer
        self._claims = found
        self._plan: Plan | None = None
        self._swapped: list[Swap] = []
        self._moving: list[tuple[Batch, list[Tensor]]] = []
        self._outer: FrameType | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]
        _mark(found, self._token)
        # Where nobody keeps the attachment, an optimizer that is gone carries nothing.
        marked = [(weakref.ref(module), keys) for module, keys in _keys(found)]
        self._release = weakref.finalize(optimizer, _unmark, marked, self._token)
        self._release.atexit = False

    def __repr__(self) -> str:
        kinds = [claim.family[0] for claim in self._acting()]
        told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        name = "removed" if self._optimizer is None else type(self._optimizer).__name__
        return f"Attachment({name}: {told or 'nothing'})"

    def __deepcopy__(self, memo: object) -> Attachment:
        return _detached()

    def __reduce__(self) -> tuple[Callable[[], Attachment], tuple[()]]:
        return (_detached, ())

    def remove(self) -> None:
        """Gives the penalties back to `reg_loss`; the optimizer steps as if never attached."""
        self._restore_what_raised()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._release is not None:
            self._release()
        self._claims = []
        self._optimizer = None

    @torch.no_grad()
    def finalize(self, tolerance: float = 1e-6) -> dict[str, int]:
        """Sets entries with |w| <= tolerance to exactly zero where L1 or GroupLasso acts.

        With minibatch noise some weights hover at 1e-7: this makes the support exact.

        Returns:
            How many exact zeros each of those sites then has.
        """
        number("finalize", "tolerance", tolerance)
        sparse = {c.path: c for c in self._acting() if _is_sparse(c)}
        weights = {path: w for path, c in sparse.items() if (w := c.parameter()) is not None}
        for w in weights.values():
            part = sharded.local(w)
            part.masked_fill_(part.abs() <= tolerance, 0)
        first = penalty.first_names(self._root)
        named = {first.get(id(w), path): w for path, w in weights.items()}
        return {path: int((sharded.whole(w) == 0).sum()) for path, w in named.items()}

    def _acting(self) -> list[Claim]:
        """The claims that it carries still: unregularize and None take them from it."""
        return [c for c in self._claims if c.mark() is not None and _holder(c) is self._token]

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Before the step; a closure, which computes the gradients inside it, is wrapped."""
        if self._outer is not None and _is_running(self._outer):
            return None  # a subclass's step that calls super().step(): once is enough
        self._restore_what_raised()
        self._outer = sys._getframe(1)
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            self._before(optimizer)
            return None
        wrapped = self._after_closure(optimizer, closure)
        if len(args) < 2:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _after_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        @functools.wraps(closure)
        def wrapped() -> Any:
            self._restore()
            loss = closure()
            self._before(optimizer)
            return loss

        return wrapped

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if sys._getframe(1) is not self._outer:
            return
        self._outer = None
        self._restore()
        moving, self._moving = self._moving, []
        with torch.no_grad():
            for batch, ws in moving:
                batch.follow(optimizer, ws)

    @torch.no_grad()
    def _before(self, optimizer: Optimizer) -> None:
        """Swaps in the gradients that contain the penalties, and decays."""
        self._moving = []
        if _is_skipped(optimizer):
            return
        plan = self._current_plan(optimizer)
        try:
            for batch in plan.pulling:
                self._swapped += batch.swap(optimizer)
        except BaseException:
            self._restore()
            raise
        for batch in plan.decaying:
            batch.decay(optimizer)
        self._moving = [(batch, batch.moving()) for batch in plan.following]

    def _restore(self) -> None:
        """Puts the data gradients back."""
        for swap in reversed(self._swapped):
            swap.back()
        self._swapped = []

    def _restore_what_raised(self) -> None:
        """The same after a step that raised, save where a gradient has been computed since."""
        self._swapped = [swap for swap in self._swapped if swap.is_untouched]
        self._restore()

    def _current_plan(self, optimizer: Optimizer) -> Plan:
        if self._plan is None or not self._plan.is_current(optimizer):
            self._plan = Plan(self._acting(), optimizer)
        return self._plan


def _detached() -> Attachment:
    """What stands for an attachment in a copy: it carries nothing."""
    copied = Attachment.__new__(Attachment)
    copied.__dict__.update(
        _root=nn.Module(),
        _token=object(),
        _claims=[],
        _optimizer=None,
        _handles=[],
        _swapped=[],
        _release=None,
    )
    return copied


def _is_running(frame: FrameType) -> bool:
    """Whether the frame is on this thread's stack, so that its step has not ended or raised."""
    at: FrameType | None = sys._getframe(1)
    while at is not None and at is not frame:
        at = at.f_back
    return at is not None


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether GradScaler has found an overflow, for which a fused optimizer skips its update."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _is_sparse(claim: Claim) -> bool:
    return claim.family[0] in (L1.__name__, GroupLasso.__name__)


def _holder(claim: Claim) -> object:
    """The token of the attachment that carries the claim now."""
    return record.read(claim.module).carried.by.get(claim.key)


def _mark(found: Iterable[Claim], token: object) -> None:
    for module, keys in _keys(found):
        held = record.read(module)
        carried = Carried({**held.carried.by, **dict.fromkeys(keys, token)})
        record.write(module, dataclasses.replace(held, carried=carried))


def _unmark(marked: list[tuple[weakref.ref[nn.Module], frozenset[Key]]], token: object) -> None:
    for ref, keys in marked:
        module = ref()
        held = record.EMPTY if module is None else record.read(module)
        by = held.carried.by
        if module is not None and any(by.get(key) is token for key in keys):
            left = {key: holder for key, holder in by.items() if holder is not token}
            record.write(module, dataclasses.replace(held, carried=Carried(left)))


def _keys(found: Iterable[Claim]) -> Iterator[tuple[nn.Module, frozenset[Key]]]:
    by_module: dict[int, tuple[nn.Module, set[Key]]] = {}
    for claim in found:
        by_module.setdefault(id(claim.module), (claim.module, set()))[1].add(claim.key)
    return ((module, frozenset(keys)) for module, keys in by_module.values())


@torch.no_grad()
def sparsity(model: nn.Module) -> dict[str, float]:
    """The share of exact zeros of every weight that a penalty acts on, attached or not.

    The keys are those of `penalties(model, attached=True)`, outputs left out.
    """
    found = penalty.weights(penalty.settled(model))
    whole = {path: sharded.whole(w) for path, w in found.items()}
    return {path: (w == 0).sum().item() / max(w.numel(), 1) for path, w in whole.items()}
