"""What the trainers share: penalties that are there already, decay that nobody carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from regwrap.errors import PolicyError
from regwrap.findings.decay import uncarried
from regwrap.findings.look import Look, listed, site_path
from regwrap.penalty import penalties, reg_loss

_LINEAR = ("Add", "Sub", "Neg", "Mul", "Div", "Sum", "Mean", "Stack", "Cat", "View", "ToCopy")
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
    `fc.weight`) the loss's graph does to the same leaf, and on the way there it is only added up,
    scaled and whatever else the penalties do; a forward that squares a weight has a matrix product
    or a loss function on the way.
    """
    fresh = penalties(model)
    on_outputs = [value for site, value in fresh.items() if site.endswith(_OUTPUT)]
    on_weights = [value for site, value in fresh.items() if not site.endswith(_OUTPUT)]
    outputs = {use for value in on_outputs for use in _uses(value)}
    one_by_one = {use for value in on_weights for use in _uses(value)} - outputs
    together = set(_uses(reg_loss(model))) - outputs  # other operations: it sums in buckets
    inside = {type(node) for value in on_weights for node in _graph(value)}
    found = set(_uses(loss, lambda node: type(node) in inside or _is_linear(node)))
    return bool(one_by_one) and (one_by_one <= found or together <= found)


def _is_linear(node: Any) -> bool:
    """Whether an operation adds up or scales."""
    return node.name().rstrip("0123456789").removesuffix("Backward") in _LINEAR


def _anything(node: Any) -> bool:
    return True


def _uses(value: Tensor, goes_on: Callable[[Any], bool] = _anything) -> Iterator[tuple[int, str]]:
    """Every use of a leaf in the graph of a value: the leaf, and what is done to it."""
    for node in _graph(value, goes_on):
        for inner, _ in node.next_functions:
            if hasattr(inner, "variable"):  # a leaf
                yield id(inner.variable), node.name()


def _graph(value: Tensor, goes_on: Callable[[Any], bool] = _anything) -> Iterator[Any]:
    """The operations that gave a value, back to those through which `goes_on` does not go."""
    seen: set[Any] = set()
    todo = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if goes_on(node):
            todo += [inner for inner, _ in node.next_functions]


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
