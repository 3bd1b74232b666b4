"""Checks of penalties: what cannot act, acts on the wrong thing, or at the wrong strength."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from regwrap import record, sites
from regwrap.findings.look import Finding, Look, by_rule, factor_now, listed, site_path
from regwrap.findings.neighbours import neighbours
from regwrap.record import Entry
from regwrap.terms import L1, L2, Dropout, GroupLasso, Term, WeightDecay, WeightTerm
from regwrap.where import shown

_MUCH, _LITTLE = 0.5, 1e-6  # of the data loss
_KERAS = 0.01  # the default strength of every regularizer in keras.regularizers


def frozen(look: Look) -> Iterator[Finding]:
    """A rule all of whose weights are frozen."""
    acting = [e for e in look.policy if isinstance(e.term, WeightTerm | WeightDecay) and e.shape]
    for entries in by_rule(acting):
        stored = [p for e in entries for p in look.stored(e)]
        if stored and not any(p.requires_grad for p in stored):
            yield Finding(
                "frozen",
                "warning",
                site_path(entries[0]),
                f"{listed(map(site_path, entries))}: {entries[0].term!r} reaches frozen weights "
                "only, and adds nothing.",
                "Unfreeze them (they count from then on), or leave the rule out.",
            )


def not_attached(look: Look) -> Iterator[Finding]:
    """A term that acts in the optimizer's step alone (MaxNorm), without an attachment."""
    waiting = [
        e
        for e in look.policy
        if e.mechanism == "optimizer"
        and not isinstance(e.term, WeightDecay)
        and not look.is_carried(e)
    ]
    for entries in by_rule(waiting):
        yield Finding(
            "not-attached",
            "error",
            site_path(entries[0]),
            f"{listed(map(site_path, entries))}: {entries[0].term!r} acts in the optimizer's step "
            "alone, and no optimizer is attached.",
            "Call regwrap.attach(model, optimizer) before training.",
        )


def before_norm(look: Look) -> Iterator[Finding]:
    """A penalty on a weight whose scale the next layer takes away."""
    normed = _normed(look)
    hit = [e for e in look.in_loss(L1, L2, GroupLasso) if e.path in normed and e.site == "weight"]
    for entries in by_rule(hit):
        first = entries[0]
        yield Finding(
            "before-norm",
            "info" if isinstance(first.term, L2) else "warning",
            site_path(first),
            f"{listed(map(site_path, entries))}: directly before {normed[first.path]}, which takes "
            f"the weight's scale away, so that {first.term!r} changes the effective learning rate "
            "and not the function.",
            "Leave it out there with None after the rule, or keep it knowingly (van Laarhoven, "
            "L2 regularization versus batch and weight normalization, 2017).",
        )


def _normed(look: Look) -> dict[str, str]:
    """Layers by path, each with the norm layer that takes its output."""
    modules = dict(look.root.named_modules())
    return {
        a: f"{type(modules[b]).__name__} {b!r}"
        for a, b in neighbours(look.root)
        if sites.is_norm(modules[b]) and not isinstance(modules[b], nn.CrossMapLRN2d)
    }


def no_zeros(look: Look) -> Iterator[Finding]:
    """L1 in the loss, which makes weights small and none exactly zero."""
    sparse = [e for e in look.in_loss(L1, GroupLasso) if e.mechanism != "parametrization"]
    for entries in by_rule(sparse):
        yield Finding(
            "no-zeros",
            "info",
            site_path(entries[0]),
            f"{listed(map(site_path, entries))}: {entries[0].term!r} in the loss makes weights "
            "small, but none exactly zero.",
            "If zeros are wanted, call regwrap.attach(model, optimizer): proximal steps set them.",
        )


def magnitudes(look: Look) -> Iterator[Finding]:
    """Strengths out of proportion to the loss, and what Adam makes of them."""
    if not look.loss:
        return
    for entries in by_rule(look.in_loss()):
        value = sum(_value(look, e) for e in entries)
        share = value / abs(look.loss)
        if share > _MUCH:
            yield _magnitude("dominates", "warning", entries, value, look.loss, "a smaller")
        elif 0 < share < _LITTLE:
            yield _magnitude("vanishes", "info", entries, value, look.loss, "a larger")
        if (share > _MUCH or 0 < share < _LITTLE) and _is_adam(look.optimizer):
            yield _under_adam(entries, look)


def _value(look: Look, entry: Entry) -> float:
    module = look.module(entry)
    tensor = sites.read(module, str(entry.site))
    counts = any(p.requires_grad for p in look.stored(entry))
    if tensor is None or tensor.is_meta or not counts:
        return 0.0
    held = record.read(module).references.get(str(entry.site))
    assert isinstance(entry.term, WeightTerm)
    value = entry.term.value(tensor, None if held is None else held.beside(tensor))
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return float(whole) * factor_now(module, entry)


def _magnitude(
    code: str, severity: str, entries: list[Entry], value: float, loss: float, other: str
) -> Finding:
    return Finding(
        f"penalty-{code}",
        severity,
        site_path(entries[0]),
        f"{listed(map(site_path, entries))}: {entries[0].term!r} adds {value:.3g} to a loss of "
        f"{loss:.3g}: it {code}.",
        f"Take {other} strength; one that adds 3 to 10 % of the first loss is a start.",
    )


def _under_adam(entries: list[Entry], look: Look) -> Finding:
    return Finding(
        "penalty-under-adam",
        "warning",
        site_path(entries[0]),
        f"{listed(map(site_path, entries))}: {type(look.optimizer).__name__} divides a gradient by "
        f"its own size, so where {entries[0].term!r} is all there is, every strength shrinks a "
        "weight alike, and where it is little, it is lost.",
        "Write WeightDecay with AdamW instead of L2, or call regwrap.attach(model, optimizer).",
    )


def _is_adam(optimizer: torch.optim.Optimizer | None) -> bool:
    # By name: Adam, AdamW, NAdam, RAdam, Adamax, and the same of other packages.
    return "adam" in type(optimizer).__name__.lower()


def keras(look: Look) -> Iterator[Finding]:
    """Strengths that look like Keras' own."""
    usual = [e for e in look.in_loss(L2) if e.term == L2(_KERAS)]
    for entries in by_rule(usual):
        yield Finding(
            "keras-strength",
            "info",
            site_path(entries[0]),
            f"{listed(map(site_path, entries))}: L2({_KERAS}) is Keras' default strength, and "
            f"Keras' L2({_KERAS}) is {_KERAS} * sum(w^2), twice what it is here.",
            f"If it comes from Keras, write L2({2 * _KERAS}).",
        )


def partial(look: Look) -> Iterator[Finding]:
    """A rule that reaches most layers of a family, not all: 25 of 30 `v_proj`."""
    families = _families([n.path for n in look.nodes if _has_own(n.module)])
    overridden = look.policy.overridden()
    for rule, (where, term) in enumerate(look.policy.rules):
        if term is None:
            continue
        reached = {e.path for e in look.policy if e.rule == rule}
        reached |= {row["path"] for row in overridden if row["rule"] == rule}
        told = f"rule {rule} ({shown(where)!r}: {term!r}) reaches"
        yield from _partial(told, families, reached, _accounted(look, term))


def _accounted(look: Look, term: Term) -> set[str]:
    """Layers with such a term of any rule, told of as replaced, or left out in words."""
    same = {e.path for e in look.policy if e.term is not None and e.term.family == term.family}
    return same | {e.path for e in look.unrecorded} | look.left_out


def partly_adapted(look: Look) -> Iterator[Finding]:
    """Adapters (LoRA) on most layers of a family, not on all."""
    adapted = {
        n.path for n in look.nodes if any("lora_" in c for c, _ in n.module.named_children())
    }
    yield from _partial("LoRA adapts", _families([n.path for n in look.nodes]), adapted, set())


def _partial(
    who: str, families: list[tuple[str, list[str]]], reached: set[str], accounted: set[str]
) -> Iterator[Finding]:
    """One finding for all the families of which most, not all, are reached."""
    missed = []
    for family, paths in families:
        left = [p for p in paths if p not in reached and p not in accounted]
        count = sum(p in reached for p in paths)
        if left and _is_most(count, len(paths)):
            missed.append((family, f"{who} {count} of {len(paths)} {family!r}", left))
    if missed:
        (family, told, left), *others = missed
        besides = f", and so of {listed(sorted({repr(f) for f, *_ in others}))}" if others else ""
        yield Finding(
            "partial-family",
            "warning",
            left[0],
            f"{told}, not {listed(left)}{besides}.",
            f"Name all of them, with '**.{family}', or leave these out in words, with None.",
        )


def _has_own(module: nn.Module) -> bool:
    return any(True for _ in sites.parameter_names(module))


def _families(paths: list[str]) -> list[tuple[str, list[str]]]:
    """Layers of one numbered stack that have the same last name."""
    stacks: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        last = path.rpartition(".")[2]
        if last and not last.isdigit() and re.search(r"\.?\d+\.", path):
            stack = re.split(r"(?:^|\.)\d+\.", path)[0]
            stacks.setdefault((stack, last), []).append(path)
    return [(last, members) for (_, last), members in stacks.items()]


def _is_most(reached: int, whole: int) -> bool:
    # Fewer than half is a choice, such as the last two blocks; more than half is rarely one.
    return whole / 2 < reached < whole and whole > 2


def replaced(look: Look) -> Iterator[Finding]:
    """Modules that came after regularize: the rules would reach them, and do not."""
    for entries in by_rule(look.unrecorded):
        yield Finding(
            "replaced",
            "error",
            site_path(entries[0]),
            f"{listed(map(site_path, entries))}: the module came after regularize, and the policy "
            f"has no {entries[0].term!r} there.",
            "Call regularize again with the same rules.",
        )


def idle(look: Look) -> Iterator[Finding]:
    """A rule of which nothing is left."""
    for count, (where, term) in zip(look.policy.counts(), look.policy.rules, strict=True):
        off = isinstance(term, Dropout) and term.p == 0
        if term is not None and not off and not count["entries"] and not count["overridden"]:
            yield Finding(
                "rule-idle",
                "error",
                shown(where),
                f"rule {count['rule']} ({shown(where)!r}: {term!r}) acts nowhere in {look.name}.",
                "Name what is there now, or leave the rule out.",
            )
