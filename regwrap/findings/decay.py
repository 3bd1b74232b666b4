"""Checks of the optimizer: what decays twice, not at all, or should not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from regwrap import sites
from regwrap.findings.look import Finding, Look, by_rule, listed, site_path
from regwrap.record import Entry
from regwrap.terms import L2, WeightDecay


def twice(look: Look) -> Iterator[Finding]:
    """The same L2 in the loss, or in the step by `attach`, and in the optimizer's decay."""
    rates = look.decay_of()
    shrinking = [e for e in look.policy if isinstance(e.term, L2) and e.term.strength > 0]
    both = [e for e in shrinking if any(rates.get(id(p)) for p in look.stored(e))]
    for entries in by_rule(both):
        rate = next(rates[id(p)] for p in look.stored(entries[0]) if rates.get(id(p)))
        place = "step" if look.is_carried(entries[0]) else "loss"
        yield Finding(
            "l2-twice",
            "warning",
            site_path(entries[0]),
            f"{listed(map(site_path, entries))}: shrunk twice, by {entries[0].term!r} in the "
            f"{place} and by weight_decay={rate:g} of {type(look.optimizer).__name__}.",
            "Keep one: build the optimizer from regwrap.param_groups(model, weight_decay=0), or "
            "write WeightDecay instead of L2.",
        )


def not_carried(look: Look) -> Iterator[Finding]:
    """WeightDecay that no group of the optimizer carries."""
    if look.optimizer is None:
        return
    rates = look.decay_of()
    for entries in by_rule(uncarried(look, rates)):
        first = entries[0]
        held = {rates.get(id(p)) for p in look.stored(first)}
        has = "not these parameters" if None in held else f"weight_decay={max(held):g}"  # type: ignore[type-var]
        yield Finding(
            "decay-not-carried",
            "error",
            site_path(first),
            f"{listed(map(site_path, entries))}: {first.term!r} acts only in the optimizer, but "
            f"{type(look.optimizer).__name__} has {has}.",
            "Build the optimizer from regwrap.param_groups(model), or call "
            "regwrap.attach(model, optimizer).",
        )


def uncarried(look: Look, rates: dict[int, float]) -> list[Entry]:
    """WeightDecay entries whose trainable parameters have another `weight_decay`, or none."""
    wanted = wanted_rates(look)
    return [
        entry
        for entry in look.policy
        if isinstance(entry.term, WeightDecay)
        and not look.is_carried(entry)
        and any(
            p.requires_grad and rates.get(id(p)) != wanted.get(id(p)) for p in look.stored(entry)
        )
    ]


def wanted_rates(look: Look) -> dict[int, float]:
    """What WeightDecay rules say, by the parameter's id."""
    return {
        id(p): e.term.rate
        for e in look.policy
        if isinstance(e.term, WeightDecay)
        for p in look.stored(e)
    }


def stale(look: Look) -> Iterator[Finding]:
    """An optimizer that holds parameters the model no longer has, and not those it has."""
    if look.optimizer is None:
        return
    own = {id(p) for p in look.root.parameters()}
    held = {id(p) for _, p in look.groups}
    gone = len(held - own)
    missing = [path for path, _, _, p in look.parameters() if id(p) not in held]
    torn = any(_is_torn(look, entry, held) for entry in look.policy)
    # Parameters of another model beside all of this one are no fault, nor are parts left out.
    if (gone or torn) and missing:
        yield Finding(
            "optimizer-stale",
            "error",
            missing[0],
            f"{type(look.optimizer).__name__} was made for another state of {look.name}: it holds "
            f"{gone} parameters that the model does not have, and not {listed(missing)}, which so "
            "does not train.",
            "Make the optimizer after regularize, and again after replacing a layer.",
        )


def _is_torn(look: Look, entry: Entry, held: set[int]) -> bool:
    """Whether the optimizer has some of the parameters behind a site (hadamard's U), not all."""
    inside = [id(p) in held for p in look.stored(entry)]
    return entry.mechanism == "parametrization" and any(inside) and not all(inside)


def cancelled(look: Look) -> Iterator[Finding]:
    """Groups that cancel the optimizer's weight_decay."""
    default = 0 if look.optimizer is None else look.optimizer.defaults.get("weight_decay", 0)
    if not default:
        return
    rates = look.decay_of()
    ruled = {id(p) for e in look.policy for p in look.stored(e)}
    bare = [
        path
        for path, module, name, p in look.parameters()
        if rates.get(id(p)) == 0 and id(p) not in ruled and _should_decay(look, module, name, p)
    ]
    if bare:
        yield Finding(
            "decay-cancelled",
            "warning",
            bare[0],
            f"{listed(bare)}: weight_decay={default:g} of {type(look.optimizer).__name__} does "
            "not reach them, because their group sets 0.",
            f"Build the groups by regwrap.param_groups(model, weight_decay={default:g}): weights "
            "decay, biases and norms do not.",
        )


def _should_decay(look: Look, module: nn.Module, name: str, p: Tensor) -> bool:
    spared = (id(module), name) in look.marks or isinstance(module, nn.Embedding)
    return sites.is_plain(module, name, p.dim()) and not spared


def on_norms(look: Look) -> Iterator[Finding]:
    """A decay on biases, norms and what the model's author marks."""
    rates = look.decay_of()
    asked = {id(p) for e in look.policy if isinstance(e.term, WeightDecay) for p in look.stored(e)}
    decaying = [
        (path, rates[id(p)])
        for path, module, name, p in look.parameters()
        if rates.get(id(p))
        and id(p) not in asked
        and ((id(module), name) in look.marks or not sites.is_plain(module, name, p.dim()))
    ]
    if decaying:
        rate = decaying[0][1]
        yield Finding(
            "decay-on-norms",
            "info",
            decaying[0][0],
            f"{listed(path for path, _ in decaying)}: biases, norms and parameters that the "
            f"model's author spares decay with weight_decay={rate:g}.",
            f"Build the optimizer from regwrap.param_groups(model, weight_decay={rate:g}), which "
            "leaves them out.",
        )
