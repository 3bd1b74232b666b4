"""What of a policy an optimizer's step is to carry, and what it has to refuse."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from regwrap import record, sites
from regwrap.errors import PolicyError
from regwrap.optimizers import carriers
from regwrap.optimizers.carriers import Held
from regwrap.optimizers.metrics import Group
from regwrap.record import Mark
from regwrap.terms import L1, GroupLasso, Term, WeightDecay

Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Claim:
    """A term at a parameter of a module, by the module and the kind: the term may change later."""

    path: str
    module: nn.Module
    site: str
    family: tuple[str, ...]
    term: Term

    @property
    def key(self) -> Key:
        """What stands for the claim on the module's record."""
        return (self.site, self.family)

    def mark(self) -> Mark | None:
        """What lies on the module now; None once a rule has cleared it."""
        marks = (m for m in record.read(self.module).marks if (m.site, m.term.family) == self.key)
        return next(marks, None)

    def parameter(self) -> Tensor | None:
        """The live parameter, also beneath a DropConnect."""
        return sites.plain(self.module, self.site)


def claims(root: nn.Module, optimizer: Optimizer) -> list[Claim]:
    """Everything at and beneath the root that the optimizer's step is to carry, checked.

    Raises:
        PolicyError: for what cannot be carried, and where there is nothing to carry.
    """
    found = list(_carriable(root))
    if not found:
        raise PolicyError(
            f"attach: {type(root).__name__} has no entry for an optimizer; regularize it first "
            "with L1, L2, L2SP, GroupLasso, WeightDecay or MaxNorm on weights (the other terms act "
            "in the loss or in the forward)."
        )
    held = Held(optimizer)
    for claim in found:
        _check(claim, held, optimizer)
    return [claim for claim in found if not _is_idle(claim, held, optimizer)]


def _carriable(root: nn.Module) -> Iterator[Claim]:
    """Terms read directly from weights; outputs, called modules and hadamard stay in the loss."""
    for path, module in root.named_modules():
        for mark in record.read(module).marks:
            if mark.term.in_step and mark.mechanism in ("direct", "optimizer"):
                full = f"{path}.{mark.site}" if path else mark.site
                if sites.stored(module, mark.site):
                    yield Claim(full, module, mark.site, mark.term.family, mark.term)


def _check(claim: Claim, held: Held, optimizer: Optimizer) -> None:
    told = f"attach: {claim.term!r} on {claim.path!r}"
    name = type(optimizer).__name__
    if _is_carried(claim):
        raise PolicyError(
            f"{told} is attached to an optimizer already; call remove() on that attachment first."
        )
    if sites.is_effective(claim.module, claim.site):
        raise PolicyError(
            f"{told} acts on a parametrized weight, which no step of {name} can move; clear "
            f"it with {{{claim.path!r}: None}}, or attach a submodule without it and leave this "
            "one in the loss."
        )
    w = claim.parameter()
    assert w is not None
    if sites.is_lazy(w):
        raise PolicyError(
            f"{told} is lazy still; run a forward first, then make {name} and attach."
        )
    if w.requires_grad and held.group_of(w) is None:
        raise PolicyError(
            f"{told} is trainable and not among the parameters of {name}: its penalty would be "
            "lost; give the optimizer regwrap.param_groups(model), or attach a submodule that it "
            "holds."
        )
    if w.is_complex() and isinstance(claim.term, L1 | GroupLasso):
        raise PolicyError(
            f"{told} is complex: {name} moves its real and imaginary parts apart, and no proximal "
            "step follows that; attach a submodule without it and leave this one in the loss."
        )
    if getattr(claim.module, "sparse", False) is True and claim.term.in_step == "gradient":
        raise PolicyError(
            f"{told} would make the sparse gradient of its {type(claim.module).__name__} dense; "
            "build it with sparse=False, or write WeightDecay instead."
        )


def _is_carried(claim: Claim) -> bool:
    if claim.key not in record.read(claim.module).carried.by:
        return False
    gc.collect()  # an optimizer that nobody has any more may lie in a cycle still
    return claim.key in record.read(claim.module).carried.by


def _is_idle(claim: Claim, held: Held, optimizer: Optimizer) -> bool:
    """Whether there is nothing to do: frozen and not in the optimizer, or carried by its group."""
    w = claim.parameter()
    index = None if w is None else held.group_of(w)
    if index is None:
        return True
    group = optimizer.param_groups[index]
    if claim.term.in_step != "gradient":
        carriers.refuse_without_rate(optimizer, group)
    return isinstance(claim.term, WeightDecay) and decays(claim, claim.term, group, index)


def decays(claim: Claim, term: WeightDecay, group: Group, index: int) -> bool:
    """Whether the group decays the parameter at the term's rate; False where it does not decay.

    Raises:
        PolicyError: where the group has another rate.
    """
    rate = float(group.get("weight_decay") or 0)
    if rate not in (0, term.rate):
        raise PolicyError(
            f"attach: {term!r} on {claim.path!r} meets weight_decay={rate:g} in the optimizer's "
            f"group {index}; give that group weight_decay={term.rate:g} or 0, or make the "
            "optimizer from regwrap.param_groups(model)."
        )
    return rate == term.rate
