"""The front door: regularize, unregularize, plan, policy, summary."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import nn

from regwrap import figures, penalty, planning, sites, surgery, table
from regwrap.errors import brief
from regwrap.optimizers import carriers
from regwrap.record import Policy

M = TypeVar("M", bound=nn.Module)
_MISSING: Any = object()


def regularize(model: M, rules: Any = _MISSING, *, strict: bool = True) -> M:
    """Regularizes the model in place by rules and returns the same object.

    A later rule overrides an earlier one for the same site and kind of term, different kinds stack,
    and None clears. A second call adds to the first.

    Args:
        model: any module; of a `torch.compile` or DDP wrapper the module inside is meant.
        rules: a mapping `{where: term | [terms] | None}`, a sequence of `(where, term)` pairs, or a
            term or tuple of terms for the whole model.
        strict: False makes a rule that reaches nothing a warning.

    Raises:
        UnmatchedRule: when a rule reaches nothing.
        PolicyError: when a rule or a site cannot be carried out.
        TypeError: for rules of another form. The model is untouched after every error.
    """
    root = _module(model, rules, "regularize")
    penalty.settle(root)
    surgery.apply(root, planning.draft(root, rules, strict=strict))
    return model


def plan(model: nn.Module, rules: Any = _MISSING, *, strict: bool = True) -> Policy:
    """What `regularize` would put in force; reads the model, never writes, raises the same."""
    root = _module(model, rules, "plan")
    return planning.draft(root, rules, strict=strict).policy


def policy(model: nn.Module) -> Policy:
    """What is in force on the model."""
    return planning.in_force(penalty.settled(model))


def unregularize(model: M) -> M:
    """Takes back everything at and beneath the module, exactly; returns the same object."""
    surgery.revert(sites.unwrap(model))
    return model


def summary(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    console: Any = None,
    values: bool = False,
    collapse: bool = True,
) -> None:
    """Prints what acts on every layer, by which rule and by which mechanism.

    Args:
        model: with a policy; without one, what regularizes it already is shown.
        optimizer: shows the `weight_decay` of each layer's parameters besides.
        console: a `rich.console.Console`; by default a new one on standard output.
        values: shows each weight's 2-norm and penalty, and `reg_loss` (reads the tensors).
        collapse: shows layers of equal shape and policy in a numbered stack as one row.
    """
    table.show(sheet(model, optimizer=optimizer, values=values, collapse=collapse), console)


def sheet(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    values: bool = False,
    collapse: bool = True,
) -> table.Sheet:
    """What `summary` prints, for any form of it."""
    root = penalty.settled(model)
    in_force = planning.in_force(root)
    extra: dict[str, Any] = {"collapse": collapse}
    if optimizer is not None:
        extra["decay"] = figures.decay(root, carriers.readable(optimizer, "summary"))
    if values:
        extra["values"] = figures.values(root, in_force)
        extra["footer"] = [f"reg_loss = {penalty.reg_loss(root).item():.6g}"]
    shown = in_force.sheet(**extra)
    if not in_force.rules:
        note = "no policy: this is what regularizes the model of its own"
        shown = dataclasses.replace(shown, rows=figures.existing(root), footer=[note])
    return shown


def _module(model: object, rules: object, name: str) -> nn.Module:
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise TypeError(
            f"{name}(model, rules) needs an nn.Module, not {brief(model)}; to regularize every "
            "instance of a class, decorate it with @regularized(rules)."
        )
    if rules is _MISSING:
        raise TypeError(f"{name}(model, rules) needs rules, such as L2(1e-4) or {{'head': None}}.")
    return sites.unwrap(model)
