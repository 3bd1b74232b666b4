"""The policy of claims: a line a site, with what has to be said of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from regwrap import record, sites
from regwrap.graph import joined
from regwrap.planning.claims import Claim, Claims
from regwrap.planning.survey import (
    CALL,
    OUTPUT,
    Key,
    Site,
    Survey,
    can_be_penalised,
    class_name,
    elements,
    shapes,
)
from regwrap.record import Entry, Layer, Policy, Rule
from regwrap.sites import Node
from regwrap.terms import MaxNorm


def draw_policy(survey: Survey, claims: Claims, rules: list[Rule]) -> Policy:
    """The policy of finished claims, in module order."""
    order = {rule: i for i, rule in enumerate(rules)}
    lines: list[Entry] = []
    replaced: list[Entry] = []
    covered = 0
    layers: list[Layer] = []
    gone = _gone(claims)
    for node in survey.firsts():
        mine: list[Entry] = []
        for key, name in _sites_of(survey, gone, node):
            held = claims.held.get(key, {}).values()
            ranked = sorted(held, key=lambda c: c.rule.order)
            mine += [_entry(survey, node, key, name, claim, order) for claim in ranked]
            covered += mine[-1].parameters if ranked else 0
            lost = sorted(claims.lost.get(key, ()), key=_when_lost)
            replaced += [_entry(survey, node, key, name, claim, order) for claim in lost]
        own = survey.keys[id(node.module)]
        if own:
            layers.append((node.path, tuple(shapes(survey.sites[key]) for key in own.values())))
        lines += mine or ([_bare(survey, node)] if own else [])
    total = sum(elements(site) for site in survey.sites.values())
    pairs = tuple((rule.where, rule.term) for rule in rules)
    return Policy(tuple(lines), pairs, tuple(replaced), tuple(layers), total, covered)


def with_leftovers(policy: Policy, survey: Survey) -> Policy:
    """The policy, which says where a Dropout acts still whose layer has been replaced."""
    left = dict(_leftovers(survey))
    if not left:
        return policy
    lines = (
        dataclasses.replace(line, note="; ".join(filter(None, (line.note, left.get(line.path)))))
        for line in policy.lines
    )
    return dataclasses.replace(policy, lines=tuple(lines))


def _leftovers(survey: Survey) -> Iterator[tuple[str, str]]:
    for node in survey.firsts():
        for child, rate in sites.rewritten(node.module).items():
            path = joined(node.path, child)
            layer = sites.submodule(survey.model, path)
            if layer is not None and not any(map(_has_fx_mark, layer.modules())):
                told = f"a Dropout of rate {rate:g} for the layer that was here before acts still"
                yield path, f"{told}: call regularize again"


def _has_fx_mark(module: nn.Module) -> bool:
    return any(mark.mechanism == "fx" for mark in record.read(module).marks)


def _when_lost(claim: Claim) -> tuple[int, int]:
    """Ranks overridden claims in one order for a plan and for what several owners keep of it."""
    assert claim.by is not None
    return claim.by.order, claim.rule.order


def _sites_of(survey: Survey, gone: dict[int, list[Key]], node: Node) -> Iterator[tuple[Key, str]]:
    """The sites that stand under this module's name: its own first, then its call."""
    module = node.module
    for name, key in survey.keys[id(module)].items():
        first, first_name = survey.sites[key].owners[0]
        if first is module and first_name == name:
            yield key, name
    for key in gone.get(id(module), ()):
        yield key, str(key[2])
    yield (OUTPUT, id(module)), OUTPUT
    yield (CALL, id(module)), CALL


def _gone(claims: Claims) -> dict[int, list[Key]]:
    """Sites that a record names and their module no longer has, by module."""
    gone: dict[int, list[Key]] = {}
    for key in dict.fromkeys((*claims.held, *claims.lost)):
        if key[0] == "gone":
            gone.setdefault(int(key[1]), []).append(key)  # type: ignore[call-overload]
    return gone


def _entry(
    survey: Survey, node: Node, key: Key, name: str, claim: Claim, order: dict[Rule, int]
) -> Entry:
    site = survey.sites.get(key)
    note = (
        _note(survey, node, site, claim)
        if key[0] != "gone"
        else "the module has no such parameter now"
    )
    if claim.by is not None:
        verb = "cleared" if claim.by.term is None else "replaced"
        note = f"{verb} by rule {order[claim.by]}"
    elif key[0] in (CALL, OUTPUT):
        note = _call_note(survey, node, claim)
    if claim.by is None:
        note = "; ".join(filter(None, (note, *_later(claim))))
    return Entry(
        path=node.path,
        layer=class_name(node.module),
        shape=None if site is None else sites.shape(node.module, name),
        parameters=0 if site is None else elements(site),
        term=claim.term,
        site=name,
        mechanism=_mechanism(claim) if key[0] != "gone" else None,
        rule=order[claim.rule],
        note=note,
    )


def _mechanism(claim: Claim) -> str | None:
    return "optimizer" if _is_carried(claim) else claim.mechanism


def _is_carried(claim: Claim) -> bool:
    """Whether `attach` has taken the entry over since it was planned."""
    return claim.by is None and any(
        record.read(module).is_carried(claim.mark(name)) for module, name in claim.owners
    )


def _later(claim: Claim) -> Iterator[str]:
    """What attach and schedules have made of the entry since it was planned, or have yet to."""
    if isinstance(claim.term, MaxNorm) and not _is_carried(claim):
        yield "acts once attach(model, optimizer) is called"
    for module, name in claim.owners[:1]:
        factor = record.read(module).factor(claim.mark(name))
        if factor is not None:
            yield f"scheduled: x {factor.value:g} now"


def _bare(survey: Survey, node: Node) -> Entry:
    module = node.module
    names = survey.keys[id(module)]
    count = sum(elements(survey.sites[key]) for key in names.values())
    shared = [
        f"{name} is shared with {survey.sites[key].paths[0]}"
        for name, key in names.items()
        if survey.sites[key].owners[0][0] is not module
    ]
    stiff = [
        f"{name} is {sites.stored(module, name)[0].dtype}: it has no gradient"
        for name in names
        if not can_be_penalised(module, name)
    ]
    return Entry(node.path, class_name(module), None, count, note="; ".join(shared + stiff))


def _note(survey: Survey, node: Node, site: Site | None, claim: Claim) -> str:
    if site is None:
        return ""
    module, name = site.owners[0]
    stored = sites.stored(module, name)
    told = []
    if others := site.paths[1:]:
        told.append(f"shared with {_listed(others)}")
    if sites.is_foreign(module, name):
        told.append("parametrized: its effective value counts")
    if any(sites.is_lazy(t) for t in stored):
        told.append("lazy: counts once it is initialized")
    if stored and all(isinstance(t, nn.Parameter) and not t.requires_grad for t in stored):
        told.append("frozen: does not count")
    if claim.mechanism is None:
        told.append(_idle(survey, node))
    if claim.mechanism == "parametrization" and sites.comes_late(module, name):
        told.append("in parameters() it comes after the layer's others")
    if getattr(module, "sparse", False) is True and claim.mechanism == "direct":
        told.append("its sparse gradient becomes dense")
    return "; ".join(told)


def _idle(survey: Survey, node: Node) -> str:
    """Why a term that is there installs nothing."""
    if survey.is_called(node.module):
        return "rate 0: installs nothing"
    idle = id(node.module) in survey.idle
    return f"never called: {'a function uses its weight' if idle else 'it has no forward'}"


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


def _call_note(survey: Survey, node: Node, claim: Claim) -> str:
    aliases = survey.names[id(node.module)][1:]
    told = [f"shared with {_listed(aliases)}"] if aliases else []
    if claim.note:
        told.append(claim.note)
    elif claim.mechanism is None:
        told.append(_idle(survey, node))
    return "; ".join(told)
