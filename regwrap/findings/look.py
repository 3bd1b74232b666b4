"""What the checks look at (model, policy, optimizer, a typical loss), and what they say."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from regwrap import planning, record, sites
from regwrap.errors import RegwrapError
from regwrap.graph import joined
from regwrap.record import Entry
from regwrap.terms import WeightTerm
from regwrap.where import parse_where

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """Something that does not do what it looks like."""

    code: str
    """A short name, stable between versions."""
    severity: str
    """`"error"`, `"warning"` or `"info"`."""
    path: str
    """The first site or module that it concerns; `""` for the model or the optimizer."""
    message: str
    """What is found, and why it matters."""
    fix: str
    """The way out."""


class Look:
    """One look at a model; reads only."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        loss: float | None = None,
    ) -> None:
        self.root = sites.unwrap(model)
        self.name = type(self.root).__name__
        self.policy = planning.in_force(self.root)
        self.optimizer = optimizer
        self.loss = loss
        tree = sites.nodes(self.root)
        self.nodes = [node for node in tree if node.first]
        self.marks = sites.author_marks(tree)

    @property
    def groups(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Every parameter of the optimizer with its group."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    yield group, parameter

    def decay_of(self) -> dict[int, float]:
        """The `weight_decay` that the optimizer gives, by the parameter's id."""
        return {id(p): float(group.get("weight_decay", 0)) for group, p in self.groups}

    def module(self, entry: Entry) -> nn.Module:
        """Where the entry acts."""
        return self.root.get_submodule(entry.path)

    def stored(self, entry: Entry) -> list[Tensor]:
        """The parameters behind the entry's site; none for an output or a call."""
        return sites.stored(self.module(entry), entry.site) if entry.shape is not None else []  # type: ignore[arg-type]

    def is_carried(self, entry: Entry) -> bool:
        """Whether `attach` has taken the entry over."""
        carried = getattr(record.read(self.module(entry)), "carried", None)
        return carried is not None and _mark(entry) in carried.by

    @functools.cached_property
    def unrecorded(self) -> list[Entry]:
        """What the rules on the model would do now and the policy does not have."""
        rules = [(rule.where, rule.term) for rule in record.read(self.root).rules]
        try:
            with warnings.catch_warnings():
                # a where of which only the text is left matches nothing
                warnings.simplefilter("ignore")
                again = planning.draft(self.root, rules, strict=False).policy
        except RegwrapError:
            return []
        there = {(e.path, e.site, repr(e.term)) for e in self.policy if e.mechanism}
        # cleared by a rule of which only the text is left, such as a lambda's
        there |= {(r["path"], r["site"], r["term"]) for r in self.policy.overridden()}
        return [e for e in again if e.mechanism and (e.path, e.site, repr(e.term)) not in there]

    @functools.cached_property
    def left_out(self) -> set[str]:
        """The paths beneath what a rule names with None."""
        clears = [parse_where(where) for where, term in self.policy.rules if term is None]
        named = [
            n.path for n in self.nodes if any(w.selects_module(n.path, n.module) for w in clears)
        ]
        inside = tuple(f"{path}." for path in named if path)
        return {
            n.path
            for n in self.nodes
            if n.path in named or "" in named or n.path.startswith(inside)
        }

    def in_loss(self, *kinds: type[WeightTerm]) -> list[Entry]:
        """Entries of these kinds on parameters that act through `reg_loss`, with a strength."""
        return [
            e
            for e in self.policy
            if isinstance(e.term, kinds or WeightTerm)
            and e.term.strength > 0
            and e.shape is not None
            and e.mechanism not in (None, "optimizer")
        ]

    def parameters(self) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        """Every trainable parameter once: its path, its module, its own name, itself."""
        seen: set[int] = set()
        for node in self.nodes:
            for name in sites.parameter_names(node.module):
                for tensor in sites.stored(node.module, name):
                    if tensor.requires_grad and not is_lazy(tensor) and id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield joined(node.path, name), node.module, name, tensor


def factor_now(module: nn.Module, entry: Entry) -> float:
    """What a schedule multiplies the entry by now, 1 where there is none."""
    factor = getattr(record.read(module), "factors", {}).get(_mark(entry))
    return 1.0 if factor is None else float(factor.value)


def _mark(entry: Entry) -> tuple[str | None, tuple[str, ...]]:
    """By what attach and schedules know an entry on its module."""
    assert entry.term is not None
    return entry.site, entry.term.family


def site_path(entry: Entry) -> str:
    """The full name of an entry's site; of a call, its layer."""
    return entry.path if entry.site == "call" else joined(entry.path, str(entry.site))


def listed(paths: Iterable[str]) -> str:
    """`a`, `a and b`, or `a and 7 more`."""
    first, *rest = list(paths)
    if not rest:
        return first
    return f"{first} and {rest[0] if len(rest) == 1 else f'{len(rest)} more'}"


def by_rule(entries: Iterable[Entry]) -> list[list[Entry]]:
    """The entries of each rule together: one finding a rule, not one a layer."""
    found: dict[object, list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.rule, entry.term), []).append(entry)
    return list(found.values())
