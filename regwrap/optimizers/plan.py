"""A step's work, in batches: the parameters of one group on which one term acts alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from regwrap import record
from regwrap.errors import PolicyError
from regwrap.optimizers import metrics, sharded
from regwrap.optimizers.carriers import Held
from regwrap.optimizers.claims import Claim, decays
from regwrap.optimizers.metrics import Group
from regwrap.proximal import Metric
from regwrap.record import Factor, Mark, Reference
from regwrap.terms import MaxNorm, Term, WeightDecay, WeightTerm


@dataclass(frozen=True, eq=False)
class Swap:
    """A parameter whose gradient is another one for the time of a step."""

    w: Tensor
    before: Tensor
    put: Tensor
    version: int
    """Of what is put, which tells whether anybody has written there since."""

    def back(self) -> None:
        """Puts the data gradient back, save where the step has dropped it."""
        if self.w.grad is self.put:
            self.w.grad = self.before

    @property
    def is_untouched(self) -> bool:
        """Whether nobody has zeroed it, or added to it, in place."""
        return self.put._version == self.version


@dataclass(frozen=True, eq=False)
class Batch:
    """Parameters of one group that one term, at one strength, acts on."""

    group: int
    term: Term
    factor: Factor | None
    ws: list[Tensor] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    buffers: dict[int, Tensor] = field(default_factory=dict)

    def moving(self) -> list[Tensor]:
        """The parameters that this step moves: the optimizer leaves those without gradient."""
        return [w for w in self.ws if w.grad is not None]

    def now(self) -> Term:
        """The term at its present strength."""
        return self.term if self.factor is None else self.term.times(self.factor.value)

    def swap(self, optimizer: Optimizer) -> list[Swap]:
        """Gives every parameter the gradient that contains the penalty's; returns both."""
        term = self.now()
        assert isinstance(term, WeightTerm)
        at = [i for i, w in enumerate(self.ws) if w.grad is not None]
        ws = [self.ws[i] for i in at]
        before = [w.grad for w in ws if w.grad is not None]
        if not ws:
            return []
        _refuse_sparse(before, term, optimizer)
        references = [self.references[i].beside(self.ws[i]) for i in at if self.references]
        outs = self._outs(optimizer, ws, before)
        by = _by(optimizer, self._of(optimizer))
        swapped = term.pulled(before, ws, references, by, outs)
        for w, gradient in zip(ws, swapped, strict=True):
            w.grad = gradient
        rows = zip(ws, before, swapped, strict=True)
        return [Swap(w, old, put, put._version) for w, old, put in rows]

    def _outs(
        self, optimizer: Optimizer, ws: list[Tensor], grads: list[Tensor]
    ) -> list[Tensor] | None:
        """Where the swapped gradients are written: on a CPU into memory kept between steps.

        100 MB that are fresh at every step are mapped, zeroed and unmapped each time: 34 ms for
        ResNet-50's weights, where the same sum into kept memory takes 14. An accelerator's
        allocator keeps memory by itself; an optimizer that is not torch's may keep gradients.
        """
        plain = all(g.device.type == "cpu" and not sharded.is_distributed(g) for g in grads)
        if not plain or not metrics.is_exact(optimizer):
            return None
        pairs = zip(ws, grads, strict=True)
        return [self._out(w, gradient) for w, gradient in pairs]

    def _out(self, w: Tensor, gradient: Tensor) -> Tensor:
        kept = self.buffers.get(id(w))
        fits = kept is not None and kept.shape == gradient.shape and kept.dtype == gradient.dtype
        if kept is None or not fits or kept is gradient:  # the last: left by a step that raised
            kept = self.buffers[id(w)] = torch.empty_like(gradient)
        return kept

    def decay(self, optimizer: Optimizer) -> None:
        """Decoupled weight decay of the parameters that this step moves."""
        term = self.now()
        assert isinstance(term, WeightDecay)
        ws = [sharded.local(w) for w in self.moving()]
        if ws:
            term.decay_(ws, metrics.learning_rate(self._of(optimizer)))

    def follow(self, optimizer: Optimizer, moved: list[Tensor]) -> None:
        """The proximal step or the projection of the parameters that the step has moved."""
        term = self.now()
        if isinstance(term, MaxNorm):
            sharded.run(lambda ws, _: term.project_(ws), term, moved, Metric(0))
            return
        assert isinstance(term, WeightTerm)
        for ws, metric in metrics.metrics(optimizer, self._of(optimizer), moved):
            sharded.run(term.shrink_, term, ws, metric)

    def _of(self, optimizer: Optimizer) -> Group:
        return optimizer.param_groups[self.group]


def _by(optimizer: Optimizer, group: Group) -> float:
    """What the penalty's gradient is multiplied by to arrive as a gradient of the loss.

    Under `maximize` the optimizer turns the gradient round, and the penalty's has to be turned
    before; under GradScaler a fused optimizer still sees scaled gradients and divides by the scale.
    """
    scale = getattr(optimizer, "grad_scale", None)
    sign = -1.0 if group.get("maximize") else 1.0
    return sign if scale is None else sign * float(scale)


def _refuse_sparse(grads: Sequence[Tensor], term: Term, optimizer: Optimizer) -> None:
    if any(g.layout is not torch.strided for g in grads):
        raise PolicyError(
            f"{type(optimizer).__name__}.step(): {term!r} is attached to a parameter whose "
            "gradient is sparse and would become dense; build its layer with sparse=False, or "
            "write WeightDecay instead."
        )


class Plan:
    """The batches of an attachment, as long as records and groups stay what they are."""

    def __init__(self, claims: list[Claim], optimizer: Optimizer) -> None:
        self._written = record.written()
        self._held = Held(optimizer)
        batches: dict[tuple[object, ...], Batch] = {}
        for claim, mark, w in _once(claims):
            index = self._held.group_of(w)
            if index is None:
                _refuse_lost(claim, w, optimizer)
                continue
            if _changed_decay(claim, mark.term, optimizer.param_groups[index], index):
                continue
            _add(batches, claim, mark, w, index)
        ranked = sorted(batches.values(), key=lambda b: _RANK[type(b.term).__name__])
        self.pulling = [b for b in ranked if b.term.in_step == "gradient"]
        self.decaying = [b for b in ranked if b.term.in_step == "decay"]
        self.following = [b for b in ranked if b.term.in_step in ("proximal", "projection")]

    def is_current(self, optimizer: Optimizer) -> bool:
        """False once a record or the optimizer's groups have changed."""
        return self._written == record.written() and self._held.is_current(optimizer)


# The proximal step of L1 + GroupLasso is L1's, then GroupLasso's (Friedman, Hastie and Tibshirani,
# A note on the group lasso and a sparse group lasso, 2010); a projection comes last.
_RANK = {"L2": 0, "L2SP": 1, "WeightDecay": 2, "L1": 3, "GroupLasso": 4, "MaxNorm": 5}


def _once(claims: list[Claim]) -> list[tuple[Claim, Mark, Tensor]]:
    """The claims still in force, of a tied weight the later rule's."""
    latest: dict[tuple[object, ...], tuple[Claim, Mark, Tensor]] = {}
    for claim in claims:
        mark, w = claim.mark(), claim.parameter()
        if mark is None or w is None:
            continue
        key = (id(w), mark.term.family)
        if key not in latest or mark.rule.order > latest[key][1].rule.order:
            latest[key] = (claim, mark, w)
    return list(latest.values())


def _add(
    batches: dict[tuple[object, ...], Batch], claim: Claim, mark: Mark, w: Tensor, index: int
) -> None:
    held = record.read(claim.module)
    factor = held.factor(mark)
    key = (index, mark.term, id(factor), sharded.is_distributed(w))
    batch = batches.setdefault(key, Batch(index, mark.term, factor))
    batch.ws.append(w)
    if mark.site in held.references and mark.term.family[0] == "L2SP":
        batch.references.append(held.references[mark.site])


def _refuse_lost(claim: Claim, w: Tensor, optimizer: Optimizer) -> None:
    if w.requires_grad:
        raise PolicyError(
            f"{type(optimizer).__name__}.step(): {claim.term!r} on {claim.path!r} is attached, and "
            "the optimizer no longer holds that parameter; call remove() on the attachment and "
            "attach the optimizer that does."
        )


def _changed_decay(claim: Claim, term: Term, group: Group, index: int) -> bool:
    """Whether a rule has since given the decay a rate that the group carries already."""
    if not isinstance(term, WeightDecay) or term == claim.term:
        return False
    return decays(claim, term, group, index)
