"""Rules and a model make a policy; nothing here writes to the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from regwrap import record
from regwrap.errors import RegwrapWarning, UnmatchedRule
from regwrap.planning.checks import check, l2sp, start_of
from regwrap.planning.claims import Claim, Claims, load
from regwrap.planning.deeds import carry_out
from regwrap.planning.dropouts import warn_of_outputs
from regwrap.planning.entries import draw_policy, with_leftovers
from regwrap.planning.reach import Reach, reach, unmatched
from regwrap.planning.rules import parse_rules
from regwrap.planning.survey import Key, Survey
from regwrap.record import Mark, Policy, Rule
from regwrap.where import parse_where, recorded

__all__ = ["Claim", "Draft", "Key", "draft", "in_force", "parse_rules", "reached", "start_of"]


@dataclass(frozen=True)
class Draft:
    """A plan with what is to be written on each module."""

    survey: Survey
    claims: Claims
    rules: list[Rule]
    added: list[Rule]
    policy: Policy


def draft(model: nn.Module, rules: object, *, strict: bool = True) -> Draft:
    """What `regularize` would do; see `plan`."""
    pairs = parse_rules(rules)
    survey = Survey(model)
    old, claims = load(survey)
    start = 1 + max((rule.order for rule in old), default=-1)
    reaches: dict[Rule, Reach] = {}
    for i, (where, term) in enumerate(pairs):
        rule = Rule(start + i, recorded(where), term)
        reached = reaches[rule] = reach(survey, parse_where(where))
        if not carry_out(survey, claims, rule, reached):
            _raise_or_warn(unmatched(survey, i, where, term, reached), strict)
    added = list(reaches)
    check(survey, claims)
    for key, claim in l2sp(claims, added):
        start_of(survey, claim, key)
    warn_of_outputs(survey, claims, reaches)
    every = old + added
    return Draft(survey, claims, every, added, draw_policy(survey, claims, every))


def _raise_or_warn(message: str, strict: bool) -> None:
    if strict:
        raise UnmatchedRule(message)
    warnings.warn(message, RegwrapWarning, stacklevel=4)


def reached(model: nn.Module, where: object) -> Iterator[tuple[nn.Module, Mark]]:
    """What is in force on the modules and parameters that a where selects."""
    survey = Survey(model)
    selected = reach(survey, parse_where(where))
    modules = {id(node.module) for node in selected.modules}
    named = {(id(node.module), name) for node, name in selected.parameters}
    for node in survey.firsts():
        for mark in record.read(node.module).marks:
            if id(node.module) in modules or (id(node.module), mark.site) in named:
                yield node.module, mark


def in_force(model: nn.Module) -> Policy:
    """The policy that lies on the model."""
    survey = Survey(model)
    rules, claims = load(survey)
    return with_leftovers(draw_policy(survey, claims, rules), survey)
