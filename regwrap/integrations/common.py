"""What the trainers share: penalties that are there already, decay that nobody carries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from regwrap.errors import PolicyError
from regwrap.findings.decay import uncarried
from regwrap.findings.look import Look, listed, site_path
from regwrap.penalty import penalties, reg_loss

_OUTPUT = ":output"  # how the keys of activity penalties end


def refuse_second(model: nn.Module, loss: Tensor, trainer: str) -> None:
    """Refuses a loss in which the penalties are contained already.

    Raises:
        PolicyError: when the user's own step adds `reg_loss`, too.
    """
    if contains_penalties(model, loss):
        raise PolicyError(
            f"The training step adds reg_loss to its loss, and {trainer} adds it again; take it "
            f"out of the step, or do not use {trainer}."
        )


def contains_penalties(model: nn.Module, loss: Tensor) -> bool:
    """Whether the loss was computed from the model's penalties on weights, among other things.

    Seen in the autograd graph: everything that a fresh `reg_loss` does to a leaf (`PowBackward0` to
    `fc.weight`) the loss's graph does to the same leaf. A forward that does so to every penalised
    weight would be mistaken for it; none is known.
    """
    fresh = penalties(model)
    outputs = {use for k, v in fresh.items() if k.endswith(_OUTPUT) for use in _uses(v)}
    one_by_one = {use for value in fresh.values() for use in _uses(value)} - outputs
    together = set(_uses(reg_loss(model))) - outputs  # other operations: it sums in buckets
    found = set(_uses(loss))
    return bool(one_by_one) and (one_by_one <= found or together <= found)


def _uses(value: Tensor) -> Iterator[tuple[int, str]]:
    """Every use of a leaf in the graph of a value: the leaf, and what is done to it."""
    seen: set[Any] = set()
    todo = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for inner, _ in node.next_functions:
            if inner is not None and hasattr(inner, "variable"):
                yield id(inner.variable), node.name()
            else:
                todo.append(inner)


def refuse_uncarried(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Refuses `WeightDecay` rules that none of the optimizers carries.

    Raises:
        PolicyError: naming the sites and the way out.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {id(p): float(g.get("weight_decay", 0)) for g in groups for p in g["params"]}
    lacking = uncarried(Look(model), rates)
    if lacking:
        raise PolicyError(
            f"{lacking[0].term!r} of {listed(map(site_path, lacking))} is carried by no group of "
            "the optimizer; build it from regwrap.param_groups(model)."
        )
