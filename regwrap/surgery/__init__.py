"""Carries a plan out on a model, and takes it back."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable

from torch import nn

from regwrap import identity, planning, record, sites
from regwrap.errors import PolicyError, RegwrapWarning
from regwrap.penalty import RegularizedMixin, warn_of_own_reg_loss
from regwrap.planning import Claim, Draft, Key
from regwrap.planning.survey import Survey
from regwrap.record import Census, Mark, Record, Reference
from regwrap.seen import ROUND
from regwrap.surgery import fx, output, rates, scheduled, weight
from regwrap.terms import L2SP, Dropout


def apply(root: nn.Module, draft: Draft) -> None:
    """Writes the plan on the model; a failure half-way leaves the model as it was."""
    modules = [node.module for node in draft.survey.firsts()]
    before = [(m, record.lift(m)) for m in modules]
    rewrites = [(m, fx.rewritten(m)) for m in modules]
    spliced = identity.is_spliced(root, RegularizedMixin)
    try:
        _write(root, draft)
    except BaseException:
        for module, rewrite in rewrites:
            if fx.rewritten(module) != rewrite:
                _rewrite(module, () if rewrite is None else rewrite.inserts)
        for module, lifted in before:
            record.strip(module)
            module.__dict__.update(lifted.get("own", {}))
            weight.sync(module)
            rates.sync(module)
            record.strip(module)
            if lifted:
                record.lay(module, lifted)
        for module in modules:
            _schedule_inserted(module)
        if not spliced:
            identity.unsplice(root, RegularizedMixin)
        raise


def _write(root: nn.Module, draft: Draft) -> None:
    records = _records(root, draft)
    hooked = False
    for node in draft.survey.firsts():
        module = node.module
        record.write(module, records.get(id(module), record.EMPTY))
        weight.sync(module)
        rates.sync(module)
        hooked |= output.sync(module)
    _sync_owners(draft.survey)
    for module in list(root.modules()):  # a root inside may have nothing left to begin and end
        if module is root or ROUND in module.__dict__:
            hooked |= output.sync_root(module)
    if not expose(root):
        warn_of_own_reg_loss(root)
    if hooked:
        _forget_compiled()


def _sync_owners(survey: Survey) -> None:
    """Puts the dropouts that records ask for into the code of the modules that call the layers."""
    inserts: dict[int, list[fx.Insert]] = {}
    for node in survey.firsts():
        for mark in record.read(node.module).marks:
            verdict = survey.verdict(node.module) if mark.mechanism == "fx" else None
            for site in () if verdict is None else verdict.sites:
                assert isinstance(mark.term, Dropout)
                insert = fx.Insert(site.child, mark.term.p, mark.term.kind, mark.term.at)
                owner = survey.model.get_submodule(site.owner)
                inserts.setdefault(id(owner), []).append(insert)
    for node in survey.firsts():
        wanted = tuple(inserts.get(id(node.module), ()))
        present = fx.rewritten(node.module)
        if wanted != (() if present is None else present.inserts):
            _rewrite(node.module, wanted)
        _schedule_inserted(node.module)


def _rewrite(owner: nn.Module, inserts: tuple[fx.Insert, ...]) -> None:
    """Rewrites beneath the class that gives a root its `reg_loss`, as a first call would."""
    spliced = identity.is_spliced(owner, RegularizedMixin)
    identity.unsplice(owner, RegularizedMixin)
    try:
        fx.rewrite(owner, inserts)
    finally:
        if spliced:
            identity.splice(owner, RegularizedMixin)


def expose(root: nn.Module) -> bool:
    """Gives the object its `reg_loss`; whether it has none of its own, which it would keep."""
    if _owns_reg_loss(root):
        return False
    identity.splice(root, RegularizedMixin)
    return True


def _records(root: nn.Module, draft: Draft) -> dict[int, Record]:
    """The record of every module that is to have one, by the module's id."""
    marks: dict[int, list[Mark]] = {}
    lost: dict[int, list[Mark]] = {}
    references: dict[int, dict[str, Reference]] = {}
    modules: dict[int, nn.Module] = {}
    for key, claim in _every_claim(draft):
        for module, name in claim.owners:
            modules[id(module)] = module
            into = marks if claim.by is None else lost
            into.setdefault(id(module), []).append(claim.mark(name))
            if claim.by is None and isinstance(claim.term, L2SP):
                start = _reference(draft, key, claim, module, name)
                references.setdefault(id(module), {}).update(start)
    records = {}
    for node in draft.survey.firsts():
        i, old = id(node.module), record.read(node.module)
        is_root = node.module is root
        records[i] = Record(
            marks=tuple(marks.get(i, ())),
            overridden=tuple(lost.get(i, ())),
            references=references.get(i, {}),
            carried=old.carried,
            factors=old.factors,
            rules=(*old.rules, *(draft.added if is_root else ())),
            pending=old.pending,
            census=Census(modules[m] for m in marks) if is_root else old.census,
        )
    return records


def _every_claim(draft: Draft) -> Iterable[tuple[Key, Claim]]:
    for key, families in draft.claims.held.items():
        for claim in sorted(families.values(), key=lambda c: c.rule.order):
            yield key, claim
    for key, claims in draft.claims.lost.items():
        for claim in claims:
            yield key, claim


def _reference(
    draft: Draft, key: Key, claim: Claim, module: nn.Module, name: str
) -> dict[str, Reference]:
    """The starting point of a site; the same term applied again keeps the one it has."""
    old = record.read(module)
    same = any(m.site == name and m.term == claim.term for m in old.marks)
    kept = old.references.get(name) if same else None
    # of a weight replaced by one of another shape (a resized embedding) there is nothing to keep
    if kept is not None and (claim.rule not in draft.added or kept.fits(sites.look(module, name))):
        return {name: kept}
    return {name: Reference(planning.start_of(draft.survey, claim, key))}


def follow(root: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Gives dropouts that are scheduled now what reads their factor."""
    changed = False
    for module in modules:
        changed |= output.sync(module)
        weight.sync(module)
        move(module)
    for owner in root.modules():
        _schedule_inserted(owner)
    if changed:
        _forget_compiled()


def move(module: nn.Module) -> None:
    """Gives the rate that is a plain number on the module the present value."""
    rates.sync(module)


def _schedule_inserted(owner: nn.Module) -> None:
    """Gives dropouts in the owner's code that are scheduled what reads their factor."""
    present = fx.rewritten(owner)
    for name, insert in () if present is None else zip(present.names, present.inserts, strict=True):
        held = record.read(owner.get_submodule(insert.child))
        mark = next((m for m in held.marks if isinstance(m.term, Dropout)), None)
        factor = None if mark is None else held.factor(mark)
        before = owner._modules[name]
        reads = isinstance(before, scheduled.ScheduledDropout) and before.factor is factor
        if before is not None and factor is not None and not reads:
            dropout = scheduled.made(insert.kind, insert.p, factor)
            owner._modules[name] = dropout.train(before.training)


def _owns_reg_loss(root: nn.Module) -> bool:
    if identity.is_spliced(root, RegularizedMixin):
        return False
    held = (root.__dict__, root._parameters, root._buffers, root._modules)
    return hasattr(type(root), "reg_loss") or any("reg_loss" in names for names in held)


def revert(root: nn.Module) -> None:
    """Takes back everything at and beneath the module, on copies of a model too."""
    if take_back(root):
        _forget_compiled()


def take_back(root: nn.Module) -> bool:
    """The same with what is compiled left alone, for a copy that never was; whether hooks went."""
    changed = False
    _refuse_owner_above(root)
    sharded = sites.sharded(root)
    for path, module in root.named_modules():
        if id(module) in sharded and sites.changed(module):
            raise PolicyError(
                f"DropConnect and L1(..., solver='hadamard') cannot be taken from {path!r} "
                f"({type(module).__name__}), which fully_shard has sharded; load its state_dict, "
                "whose keys are plain, into a model without them."
            )
    for module in list(root.modules()):
        weight.revert(module)
        rates.revert(module)
        fx.restore(module)
        changed |= record.strip(module)
        identity.unsplice(module, RegularizedMixin)
    return changed


def _refuse_owner_above(root: nn.Module) -> None:
    """Refuses to forget a Dropout that would go on acting, in the code of a module elsewhere."""
    within: Counter[int] = Counter()
    for module in root.modules():
        found = fx.rewritten(module)
        for insert in () if found is None else found.inserts:
            # all beneath: a LoRA layer may have taken the place of the one it wraps
            called = sites.submodule(module, insert.child)
            within.update(() if called is None else map(id, called.modules()))
    was_given = record.read(root).census is not None  # then a caller may have been replaced since
    for path, module in root.named_modules():
        callers = [m.callers for m in record.read(module).marks if m.mechanism == "fx"]
        seen = within[id(module)]
        if callers and seen < max(callers) and (seen == 0 or not was_given):
            raise PolicyError(
                f"The Dropout of {path or 'the model itself'!r} ({type(module).__name__}) is in "
                "the code of a module above or beside the one given; call unregularize on the "
                "model that was regularized first."
            )


_warned = False


def _forget_compiled() -> None:
    """Drops what torch.compile has compiled: it does not look at hooks, and would go on without."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None or not frames.input_codes.seen:
        return
    import torch

    global _warned
    torch.compiler.reset()
    if not _warned:
        _warned = True
        warnings.warn(
            "A hook was put on or taken from a model after something had been compiled: "
            "torch.compiler.reset() was called, since torch.compile does not look at hooks; "
            "compiled models compile again at their next call.",
            RegwrapWarning,
            stacklevel=6,
        )
