"""The forms in which rules may be written, read once into one form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from regwrap.errors import PolicyError, brief
from regwrap.terms import Term
from regwrap.where import parse_where, shown


def parse_rules(rules: object) -> list[tuple[object, Term | None]]:
    """Rules of every accepted form as a list of (where, one term or None).

    Raises:
        TypeError: for anything else, naming the rule.
    """
    if isinstance(rules, Term) or (isinstance(rules, tuple) and rules and _flat(rules)):
        rules = {"": rules}
    if isinstance(rules, Mapping):
        pairs: list[Any] = list(rules.items())
    elif isinstance(rules, Sequence) and not isinstance(rules, str):
        pairs = list(rules)
    else:
        raise TypeError(
            "rules must be a mapping {where: term}, a sequence of (where, term) pairs or a term "
            f"such as L2(1e-4), not {brief(rules)} of type {type(rules).__name__}."
        )
    return [rule for i, pair in enumerate(pairs) for rule in _parse_pair(i, pair)]


def _parse_pair(index: int, pair: object) -> Iterator[tuple[object, Term | None]]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise TypeError(f"Rule {index} must be a pair (where, term), not {brief(pair)}.")
    where, given = pair
    parse_where(where)
    terms = [None] if given is None else _flat(given)
    if not terms:
        raise TypeError(
            f"Rule {index} ({shown(where)!r}) must have a term such as L2(1e-4), a list of terms "
            f"or None on its right, not {brief(given)}."
        )
    for term in terms:
        yield where, term


def _flat(given: object) -> list[Term]:
    """The terms of a term, or of a list of terms and of tuples of them as `ElasticNet` is one.

    Empty where there is anything else.
    """
    listed = given if isinstance(given, tuple | list) else (given,)
    terms = [t for item in listed for t in (item if isinstance(item, tuple) else (item,))]
    return terms if all(isinstance(t, Term) for t in terms) else []


def refuse_unbuilt(index: int, where: object, term: Term | None) -> None:
    """Arguments that the terms take already and no mechanism carries yet."""
    default = {"when": "always", "solver": None, "at": "output", "kind": nn.Dropout}
    for name, usual in default.items():
        if getattr(term, name, usual) != usual:
            raise PolicyError(
                f"Rule {index} ({shown(where)!r}: {term!r}) cannot be carried out yet: "
                f"{name}={getattr(term, name)!r} is not built; leave {name} out."
            )
    if getattr(term, "on", "weight") == "output":
        raise PolicyError(
            f"Rule {index} ({shown(where)!r}: {term!r}) cannot be carried out yet: penalties on "
            "outputs are not built; penalise a parameter instead."
        )
