"""Carries one rule out on the claims."""

from __future__ import annotations

from regwrap.planning.claims import Claims
from regwrap.planning.dropouts import claim_calls, release
from regwrap.planning.reach import Reach, claim_parameters
from regwrap.planning.survey import CALL, OUTPUT, Survey
from regwrap.record import Rule
from regwrap.terms import Dropout


def carry_out(survey: Survey, claims: Claims, rule: Rule, reach: Reach) -> int:
    """Gives the rule's term what it reaches, or clears it; returns how many sites."""
    if rule.term is None:
        return _clear(survey, claims, rule, reach)
    if isinstance(rule.term, Dropout):
        return claim_calls(survey, claims, rule, reach)
    return claim_parameters(survey, claims, rule, reach)


def _clear(survey: Survey, claims: Claims, rule: Rule, reach: Reach) -> int:
    """Carries out a None; returns how much its where matches."""
    drops = any(key[0] == CALL and held for key, held in claims.held.items())
    for node in reach.modules:
        module = id(node.module)
        if drops:
            release(survey, claims, rule, node.module)
        for key in (*survey.keys[module].values(), (CALL, module), (OUTPUT, module)):
            claims.clear(key, rule)
    for node, name in reach.parameters:
        claims.clear(survey.keys[id(node.module)][name], rule)
    return len(reach.modules) + len(reach.parameters)
