"""The policy as parameter groups of an optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from regwrap import record, sites
from regwrap.penalty import settled
from regwrap.record import Mark
from regwrap.terms import WeightDecay


def param_groups(
    model: nn.Module, *, weight_decay: float | None = None, **defaults: Any
) -> list[dict[str, Any]]:
    """Groups for any `torch.optim` optimizer, every trainable parameter exactly once.

    `WeightDecay(rate)` rules give their parameters `weight_decay=rate`. Of the others, biases,
    parameters of fewer than 2 dimensions, norms and what the model's author marks get 0; the rest
    get `weight_decay`, or no such key when it is None, so that the optimizer's own default holds.
    Within a group the order is that of `model.parameters()`.

    Args:
        model: with a policy or without one.
        weight_decay: of everything that no rule names and that is a weight proper.
        **defaults: further keys of every group, such as `lr`.
    """
    root = settled(model)
    rates = _rates(root)
    spared = _spared(root)
    groups: dict[Any, list[Tensor]] = {}
    for parameter in root.parameters():
        if parameter.requires_grad:
            rate = 0.0 if id(parameter) in spared else weight_decay
            groups.setdefault(rates.get(id(parameter), rate), []).append(parameter)
    return [
        {"params": members, **defaults, **({} if rate is None else {"weight_decay": rate})}
        for rate, members in groups.items()
    ]


def _rates(root: nn.Module) -> dict[int, float]:
    """What WeightDecay rules say, by the parameter's id; of a tied one, the later rule."""
    latest: dict[int, Mark] = {}
    for module in root.modules():
        for mark in record.read(module).marks:
            if isinstance(mark.term, WeightDecay):
                for tensor in sites.stored(module, mark.site):
                    held = latest.setdefault(id(tensor), mark)
                    if mark.rule.order > held.rule.order:
                        latest[id(tensor)] = mark
    return {i: mark.term.rate for i, mark in latest.items() if isinstance(mark.term, WeightDecay)}


def _spared(root: nn.Module) -> set[int]:
    """Parameters without decay of their own account; tied ones as under their first name."""
    tree = sites.nodes(root)
    marks = sites.author_marks(tree)
    plain: dict[int, bool] = {}
    for node in tree:
        for name in sites.parameter_names(node.module):
            for tensor in sites.stored(node.module, name):
                dims = 2 if is_lazy(tensor) else tensor.dim()
                decays = sites.is_plain(node.module, name, dims)
                marked = (id(node.module), name) in marks
                plain.setdefault(id(tensor), decays and not marked)
    return {i for i, decays in plain.items() if not decays}
