"""What a table shows besides the policy: norms, penalties, decay, a model's own dropouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from regwrap import sites
from regwrap.graph import joined
from regwrap.penalty import penalties
from regwrap.record import Policy

Values = dict[tuple[str, str], tuple[float | None, float]]


def values(root: nn.Module, policy: Policy) -> Values:
    """The 2-norm (of an output none) and the penalty now of every site, in the loss or the step."""
    told: Values = {}
    with torch.no_grad():
        now = penalties(root, attached=True)
        for entry in policy:
            layer, site = root.get_submodule(entry.path), str(entry.site)
            on_output = f"{entry.path}:{site}"
            if entry.shape is not None:
                key = joined(entry.path, site)
                tensor = sites.read(layer, site)
                norm = 0.0 if tensor is None else _norm2(tensor)
                told[entry.path, site] = (norm, float(now.get(key, 0.0)))
            elif on_output in now:
                told[entry.path, site] = (None, float(now[on_output]))
    return told


def _norm2(tensor: Tensor) -> float:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return float(whole.abs().double().square().sum().sqrt())


def decay(root: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The `weight_decay` that the optimizer gives each layer's parameters, by layer path."""
    rates = {
        id(p): f"{group.get('weight_decay', 0):g}"
        for group in optimizer.param_groups
        for p in group["params"]
    }
    told = {}
    for node in sites.nodes(root):
        own = {
            name: rates.get(id(tensor), "not in the optimizer")
            for name in sites.parameter_names(node.module)
            for tensor in sites.stored(node.module, name)
            if tensor.requires_grad
        }
        if node.first and own:
            told[node.path] = _by_rate(own)
    return told


def _by_rate(own: dict[str, str]) -> str:
    if len(set(own.values())) == 1:
        return next(iter(own.values()))
    return ", ".join(f"{name} {rate}" for name, rate in own.items())


def existing(root: nn.Module) -> list[dict[str, Any]]:
    """Rows of what regularizes a model without a policy: its own dropouts and parametrizations."""
    return [row for node in sites.nodes(root) if node.first for row in _existing(node)]


def _existing(node: sites.Node) -> Iterator[dict[str, Any]]:
    module = node.module
    found = [(term, "call") for term in _rates(module)]
    parametrized = [
        (f"parametrized: {_machinery(module, name)}", name)
        for name in sites.parameter_names(module)
        if sites.is_effective(module, name)
    ]
    plain = {"path": node.path, "layer": type(module).__name__, "shape": None, "term": None}
    plain |= {"site": None, "mechanism": None, "rule": None, "note": ""}
    for term, site in found + parametrized:
        yield plain | {"term": term, "site": site, "mechanism": "its own"}
    if not found and not parametrized and any(True for _ in sites.parameter_names(module)):
        yield plain


def _rates(module: nn.Module) -> Iterator[str]:
    """The module's own rates: a Dropout's `p`, timm's `drop_prob`, attributes of MHA and RNNs."""
    dropping = "drop" in type(module).__name__.lower()
    for name, value in vars(module).items():
        if not isinstance(value, float | int) or isinstance(value, bool):
            continue
        if dropping and (name == "p" or "drop" in name):
            yield f"{type(module).__name__}({value:g})"
        elif "drop" in name and 0 < value < 1:  # one of 0 regularizes nothing
            yield f"{name}={value:g}"


def _machinery(module: nn.Module, name: str) -> str:
    inside = module._modules.get("parametrizations")
    if isinstance(inside, nn.ModuleDict) and name in inside:
        return ", ".join(type(p).__name__ for p in inside[name].children()) or "?"
    return "by a hook"
