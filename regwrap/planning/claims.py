"""Which term holds which site."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from regwrap import record
from regwrap.planning.survey import CALL, OUTPUT, Family, Key, Owner, Survey
from regwrap.record import Mark, Rule
from regwrap.terms import Dropout, Term


@dataclass(frozen=True, eq=False)
class Claim:
    """A term's hold on a site, and the modules on which it is written down."""

    site: str
    term: Term
    rule: Rule
    mechanism: str | None
    owners: tuple[Owner, ...]
    by: Rule | None = None
    note: str = ""
    callers: int = 0

    def mark(self, name: str) -> Mark:
        """The claim as it lies on an owner, under the owner's name of the site."""
        held = (self.term, self.rule, self.mechanism, self.by, self.note, self.callers)
        return Mark(name, *held)


class Claims:
    """Which term holds which site; a later rule takes over within its family."""

    def __init__(self) -> None:
        self.held: dict[Key, dict[Family, Claim]] = {}
        self.lost: dict[Key, list[Claim]] = {}

    def take(self, key: Key, claim: Claim) -> None:
        """Gives the site to the claim, unless a later rule holds it already."""
        families = self.held.setdefault(key, {})
        current = families.pop(claim.term.family, None)
        if current is not None and current.rule == claim.rule:
            claim = dataclasses.replace(claim, owners=_union(current.owners, claim.owners))
        elif current is not None:
            first, last = sorted((current, claim), key=lambda c: c.rule.order)
            self._lose(key, first, last.rule)
            claim = last
        families[claim.term.family] = claim

    def clear(self, key: Key, rule: Rule) -> None:
        """Takes every family from the site."""
        for claim in self.held.pop(key, {}).values():
            self._lose(key, claim, rule)

    def displace(self, key: Key, family: Family, rule: Rule) -> None:
        """Takes one family from the site for a claim that lies elsewhere."""
        current = self.held.get(key, {}).get(family)
        if current is not None and current.rule != rule:
            del self.held[key][family]
            self._lose(key, current, rule)

    def _lose(self, key: Key, claim: Claim, by: Rule) -> None:
        self.lost.setdefault(key, []).append(dataclasses.replace(claim, by=by))


def _union(a: tuple[Owner, ...], b: tuple[Owner, ...]) -> tuple[Owner, ...]:
    held = {(id(module), name) for module, name in a}
    return a + tuple(owner for owner in b if (id(owner[0]), owner[1]) not in held)


def load(survey: Survey) -> tuple[list[Rule], Claims]:
    """What lies on the model already."""
    rules: dict[Rule, None] = {}
    found: dict[tuple[Key, Rule, Rule | None], tuple[Mark, list[Owner]]] = {}
    for node in survey.firsts():
        kept = record.read(node.module)
        rules.update(dict.fromkeys(kept.rules))
        for mark in (*kept.marks, *kept.overridden):
            rules.setdefault(mark.rule)
            if mark.by is not None:
                rules.setdefault(mark.by)
            key = _key_of_mark(survey, node.module, mark)
            _, owners = found.setdefault((key, mark.rule, mark.by), (mark, []))
            owners.append((node.module, mark.site))
    claims = Claims()
    for (key, rule, by), (mark, owners) in found.items():
        held = (mark.mechanism, tuple(owners), by, mark.note, mark.callers)
        claim = Claim(mark.site, mark.term, rule, *held)
        if by is None:
            claims.take(key, claim)
        else:
            claims.lost.setdefault(key, []).append(claim)
    return sorted(rules, key=lambda rule: rule.order), claims


def _key_of_mark(survey: Survey, module: nn.Module, mark: Mark) -> Key:
    if isinstance(mark.term, Dropout):
        return (CALL, id(module))
    if mark.site == OUTPUT and getattr(mark.term, "on", None) == OUTPUT:
        return (OUTPUT, id(module))
    return survey.keys[id(module)].get(mark.site, ("gone", id(module), mark.site))
