"""How far each optimizer moves an element: the metric of its proximal steps.

Thresholds that reach scikit-learn's solution, support included (relative error below 1.5e-6; the
naive lr * strength is .03 to 1.6 off):

    SGD           lr * strength * (1 - dampening) / (1 - momentum), nesterov or not
    Adam, AdamW   lr * strength / (sqrt(v_hat) + eps) element by element, v_hat of `max_exp_avg_sq`
                  under amsgrad

`maximize` does not enter: the penalty is always made smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from regwrap.proximal import Metric

Group = dict[str, Any]


def is_exact(optimizer: Optimizer) -> bool:
    """Whether the metric of the optimizer is known."""
    return isinstance(optimizer, SGD | Adam | AdamW)


def metrics(
    optimizer: Optimizer, group: Group, ws: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], Metric]]:
    """The parameters of one group, each with the metric in which the optimizer has moved it."""
    if isinstance(optimizer, Adam | AdamW):
        yield from _adaptive(optimizer, group, ws)
    else:
        yield list(ws), Metric(_rate(optimizer, group))


def learning_rate(group: Group) -> float:
    """The group's, which may be a tensor."""
    return float(group["lr"])


def _rate(optimizer: Optimizer, group: Group) -> float:
    rate = learning_rate(group)
    momentum = group["momentum"] if isinstance(optimizer, SGD) else 0
    return rate * (1 - group["dampening"]) / (1 - momentum) if momentum else rate


def _adaptive(
    optimizer: Optimizer, group: Group, ws: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], Metric]]:
    """Parameters by the number of their steps, on which the bias correction depends."""
    name = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    held = [(w, s) for w in ws if name in (s := optimizer.state.get(w, {}))]
    steps = _numbers([state["step"] for _, state in held])
    alike: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for (w, state), step in zip(held, steps, strict=True):
        members, moments = alike.setdefault(step, ([], []))
        members.append(w)
        moments.append(state[name])
    for step, (members, moments) in alike.items():
        correction = (1 - float(group["betas"][1]) ** step) ** -0.5
        yield members, Metric(learning_rate(group), moments, correction, group["eps"])


def _numbers(steps: list[Any]) -> list[float]:
    """Steps as numbers: on a GPU (capturable, fused) all of them in one transfer."""
    if any(isinstance(s, Tensor) and s.device.type != "cpu" for s in steps):
        return torch.stack(steps).tolist()
    return [float(s) for s in steps]
