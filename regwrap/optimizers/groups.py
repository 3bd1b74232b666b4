"""The policy as parameter groups of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from regwrap import record, sites
from regwrap.errors import brief
from regwrap.penalty import settled
from regwrap.record import Mark
from regwrap.terms import WeightDecay, number


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    groups: Iterable[Mapping[str, Any]] | None = None,
    **defaults: Any,
) -> list[dict[str, Any]]:
    """Groups for any `torch.optim` optimizer, every trainable parameter exactly once.

    `WeightDecay(rate)` rules give their parameters `weight_decay=rate`. Of the others, biases,
    parameters of fewer than 2 dimensions, norms and what the model's author marks get 0; the rest
    get `weight_decay`, or no such key when it is None, so that the optimizer's own default holds.
    Within a group the order is that of `model.parameters()`.

    Args:
        model: with a policy or without one.
        weight_decay: of everything that no rule names and that is a weight proper.
        groups: groups that there are already (layer-wise learning rates, the part of one of two
            optimizers), as an optimizer takes them: each is split by decay and keeps its other
            keys, a `weight_decay` of its own stands for its weights proper, and only their
            parameters are in the result.
        **defaults: further keys of every group, such as `lr`; a group's own come first.

    Raises:
        TypeError, ValueError: for groups of another form, a weight_decay that is no number >= 0, a
            parameter in two groups or one that is not the model's.
    """
    root = settled(model)
    if "params" in defaults:
        raise TypeError(
            "param_groups: params are the model's own; write groups=[{'params': ...}] to choose "
            "among them."
        )
    if weight_decay is not None:
        number("param_groups", "weight_decay", weight_decay)
    rates = _rates(root)
    spared = _spared(root)
    order = {id(p): i for i, p in enumerate(root.parameters())}
    told: list[dict[str, Any]] = []
    for given in _given(root, groups, order):
        usual = given.pop("weight_decay", weight_decay)
        members = sorted(given.pop("params"), key=lambda member: order[id(_tensor(member))])
        by_rate: dict[Any, list[Any]] = {}
        for member in members:
            tensor = _tensor(member)
            if tensor.requires_grad:
                rate = 0.0 if id(tensor) in spared else usual
                by_rate.setdefault(rates.get(id(tensor), rate), []).append(member)
        told += [_group(part, rate, {**defaults, **given}) for rate, part in by_rate.items()]
    return told


def _group(members: list[Any], rate: float | None, keys: dict[str, Any]) -> dict[str, Any]:
    decay = {} if rate is None else {"weight_decay": rate}
    return {"params": members, **keys, **decay}


def _given(root: nn.Module, groups: object, order: dict[int, int]) -> list[dict[str, Any]]:
    """The user's groups as dicts of our own, checked; one of everything where there are none."""
    if groups is None:
        return [{"params": list(root.parameters())}]
    if not isinstance(groups, Iterable) or isinstance(groups, Mapping):
        raise TypeError(f"param_groups: groups must be a list of dicts, not {brief(groups)}.")
    copied = [_copied(i, group) for i, group in enumerate(groups)]
    seen: dict[int, int] = {}
    for i, group in enumerate(copied):
        for member in group["params"]:
            tensor = _tensor(member)
            if id(tensor) not in order:
                raise ValueError(
                    f"param_groups: group {i} has a parameter of shape {tuple(tensor.shape)} that "
                    f"is not among those of {type(root).__name__}; give the model that holds it."
                )
            if id(tensor) in seen:
                raise ValueError(
                    f"param_groups: group {i} has a parameter of shape {tuple(tensor.shape)} that "
                    f"is in group {seen[id(tensor)]} already; leave it in one of them."
                )
            seen[id(tensor)] = i
    return copied


def _copied(index: int, group: object) -> dict[str, Any]:
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(
            f"param_groups: group {index} must be a dict with 'params', as torch.optim takes it, "
            f"not {brief(group)}."
        )
    if group.get("weight_decay") is not None:
        number(f"param_groups: group {index}", "weight_decay", group["weight_decay"])
    params = group["params"]
    members = [params] if isinstance(params, Tensor) else list(params)
    for member in members:
        if not isinstance(_tensor(member), Tensor):
            raise TypeError(
                f"param_groups: group {index} must have parameters or (name, parameter) pairs in "
                f"'params', not {brief(member)}."
            )
    return {**group, "params": members}


def _tensor(member: Any) -> Any:
    """The parameter itself, of a (name, parameter) pair too."""
    return member[1] if isinstance(member, tuple) and len(member) == 2 else member


def _rates(root: nn.Module) -> dict[int, float]:
    """What WeightDecay rules say, by the parameter's id; of a tied one, the later rule."""
    latest: dict[int, Mark] = {}
    for module in root.modules():
        for mark in record.read(module).marks:
            if isinstance(mark.term, WeightDecay):
                for tensor in sites.stored(module, mark.site):
                    held = latest.setdefault(id(tensor), mark)
                    if mark.rule.order >= held.rule.order:
                        latest[id(tensor)] = mark
    return {i: mark.term.rate for i, mark in latest.items() if isinstance(mark.term, WeightDecay)}


def _spared(root: nn.Module) -> set[int]:
    """Parameters without decay of their own account.

    A tied one is judged by its first name, and spared whichever of its names the author marks.
    """
    tree = sites.nodes(root)
    marks = sites.author_marks(tree)
    marked: set[int] = set()
    plain: dict[int, bool] = {}
    for node in tree:
        for name in sites.parameter_names(node.module):
            for tensor in sites.stored(node.module, name):
                dims = 2 if sites.is_lazy(tensor) else tensor.dim()
                plain.setdefault(id(tensor), sites.is_plain(node.module, name, dims))
                if (id(node.module), name) in marks:
                    marked.add(id(tensor))
    return marked | {i for i, decays in plain.items() if not decays}
