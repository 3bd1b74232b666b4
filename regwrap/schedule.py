"""Strengths and rates that move over steps, without recompiling anything.

Above the surgery, which gives a scheduled dropout the hook that reads its factor.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from regwrap import penalty, record, surgery
from regwrap.errors import PolicyError, UnmatchedRule
from regwrap.planning import reached
from regwrap.planning.dropouts import rate_of
from regwrap.record import Factor, Mark
from regwrap.terms import DropConnect, Dropout, Term, WeightDecay, WeightTerm
from regwrap.where import shown

Kinds = type[Term] | tuple[type[Term], ...]


class StrengthScheduler:
    """Multiplies strengths and dropout rates by `factor(step)`, in the loss and in `attach` alike.

    It applies `factor(0)` when made, as PyTorch's learning-rate schedulers do. A warm-up over 100
    steps and a cosine over 1,000 are

        StrengthScheduler(model, lambda step: min(1, step / 100))
        StrengthScheduler(model, lambda step: (1 + math.cos(math.pi * step / 1000)) / 2)

    Compiled code is not compiled again: it reads the factor from a tensor, save the rates of the
    model's own dropouts and of a dropout of another `kind=`, which compile anew at every value. A
    dropout in compiled training code draws other random numbers than `nn.Dropout` then. A copy of
    the model goes on with the factor of the moment and is moved by no schedule. Of two schedules
    on the same entry the later one holds. The decay that an optimizer's group carries is the
    optimizer's: move `group["weight_decay"]`, or give the group 0, attach, and schedule after that.

    Args:
        model: with a policy.
        factor: `step -> number`; it should depend on the step alone, so that a resumed run repeats.
        where: chooses entries, as in a rule; all by default.
        kinds: chooses entries by term classes, such as `(L1, Dropout)`; all by default.

    Raises:
        TypeError: for a factor that is not callable, or kinds that are no term classes.
        UnmatchedRule: when `where` and `kinds` choose nothing of the policy.
        PolicyError: for a kind that no schedule moves.
        ValueError: when a rate would leave [0, 1), or a strength would be negative. Nothing has
            changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        factor: Callable[[int], float],
        *,
        where: Any = None,
        kinds: Kinds | None = None,
    ) -> None:
        if not callable(factor):
            raise TypeError(
                f"StrengthScheduler: factor must be a callable step -> number, not {factor!r}."
            )
        root = penalty.settled(model)
        self._of = factor
        self._chosen = _choose(root, where, _kinds(kinds))
        self._terms: tuple[int, set[Term]] = (-1, set())
        self.last_step = 0
        value = self._checked(0)
        self._factor = Factor(value)
        _lay(self._chosen, self._factor)
        surgery.follow(root, [module for module, _ in self._chosen])

    def step(self) -> None:
        """Goes on to the next step and applies its factor."""
        value = self._checked(self.last_step + 1)
        self.last_step += 1
        self._set(value)

    def factor(self) -> float:
        """What strengths and rates are multiplied by now."""
        return self._factor.value

    def state_dict(self) -> dict[str, Any]:
        """The step: the factor follows from it."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the step of another scheduler's `state_dict` and applies its factor."""
        step = int(state["last_step"])
        self._set(self._checked(step))
        self.last_step = step

    def _set(self, value: float) -> None:
        self._factor.set(value)
        for module, _ in self._chosen:
            surgery.move(module)

    def _checked(self, step: int) -> float:
        """The factor of a step, once it is sure that every entry can take it."""
        value = self._of(step)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(
                f"StrengthScheduler: factor({step}) must be a number, not {value!r} of type "
                f"{type(value).__name__}."
            )
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"StrengthScheduler: factor({step}) must be finite, not {value!r}.")
        for term in self._distinct():
            try:
                term.times(value)
            except ValueError as error:
                raise ValueError(
                    f"StrengthScheduler: factor({step}) = {value:g} does not fit {term!r}: {error} "
                    "Choose other entries with where= or kinds=, or another factor."
                ) from error
        return value

    def _distinct(self) -> set[Term]:
        """The terms in force now, each once; looked up anew when a record has been written."""
        if self._terms[0] != record.written():
            keys = {(id(module), key) for module, key in self._chosen}
            terms = {
                mark.term
                for module in {id(m): m for m, _ in self._chosen}.values()
                for mark in record.read(module).marks
                if (id(module), _key(mark)) in keys
            }
            self._terms = (record.written(), terms)
        return self._terms[1]


_Key = tuple[str, tuple[str, ...]]
_Chosen = list[tuple[nn.Module, _Key]]


def _kinds(kinds: Any) -> tuple[type[Term], ...] | None:
    given = kinds if isinstance(kinds, tuple) else (kinds,)
    if kinds is None:
        return None
    for kind in given:
        if not (isinstance(kind, type) and issubclass(kind, Term)):
            name = getattr(kind, "__name__", repr(kind))
            also = "; an ElasticNet is an L1 and an L2" if name == "ElasticNet" else ""
            raise TypeError(
                f"StrengthScheduler: kinds must be term classes such as (L1, Dropout), not {name}"
                f"{also}."
            )
    return given


def _choose(root: nn.Module, where: Any, kinds: tuple[type[Term], ...] | None) -> _Chosen:
    every = list(reached(root, "" if where is None else where))
    if kinds is not None:
        every = [(module, mark) for module, mark in every if isinstance(mark.term, kinds)]
    if not every:
        told = "" if where is None else f"where={shown(where)!r}"
        names = "" if kinds is None else f"kinds=({', '.join(k.__name__ for k in kinds)})"
        raise UnmatchedRule(
            f"StrengthScheduler: {' and '.join(filter(None, (told, names))) or 'the policy'} "
            f"chooses no entry of {type(root).__name__}; see regwrap.policy(model) for what acts."
        )
    movable = [(module, mark) for module, mark in every if _moves(module, mark)]
    if not movable:
        raise PolicyError(_immovable(every[0][1].term))
    return [(module, _key(mark)) for module, mark in movable]


def _key(mark: Mark) -> _Key:
    return (mark.site, mark.term.family)


def _moves(module: nn.Module, mark: Mark) -> bool:
    """Whether what acts for the mark reads a factor."""
    if isinstance(mark.term, WeightDecay):
        return record.read(module).is_carried(mark)
    if isinstance(mark.term, Dropout):
        return mark.mechanism is not None and _has_rate(mark.term)
    if isinstance(mark.term, DropConnect):
        return mark.mechanism is not None
    return isinstance(mark.term, WeightTerm)


def _has_rate(term: Dropout) -> bool:
    """Whether a dropout of the term's class keeps its rate where it can be set."""
    return term.kind is nn.Dropout or rate_of(term.kind(term.p)) is not None


def _immovable(term: Term) -> str:
    told = f"StrengthScheduler: no schedule moves {term!r}"
    if isinstance(term, WeightDecay):
        return (
            f"{told}: the optimizer's group carries it; move group['weight_decay'], or give the "
            "group weight_decay=0 and call attach(model, optimizer) first."
        )
    if isinstance(term, Dropout) and not _has_rate(term):
        return (
            f"{told}: {term.kind.__name__} keeps its rate under no name that is known; call it "
            "drop_prob there."
        )
    if isinstance(term, Dropout):
        return f"{told} where it acts by no hook of its own; set the dropout's p instead."
    return f"{told}: it has no strength; call regularize again with another value instead."


def _lay(chosen: _Chosen, factor: Factor) -> None:
    for module, keys in _by_module(chosen):
        held = record.read(module)
        factors = {**held.factors, **dict.fromkeys(keys, factor)}
        record.write(module, dataclasses.replace(held, factors=factors))


def _by_module(chosen: _Chosen) -> Iterator[tuple[nn.Module, list[_Key]]]:
    grouped: dict[int, tuple[nn.Module, list[_Key]]] = {}
    for module, key in chosen:
        grouped.setdefault(id(module), (module, []))[1].append(key)
    return iter(grouped.values())
