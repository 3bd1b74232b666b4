"""Which optimizer really steps, and which cannot carry penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from regwrap.errors import PolicyError
from regwrap.optimizers.metrics import Group

_WRAPPERS = {
    "accelerate": "optimizer",
    "lightning": "_optimizer",
    "pytorch_lightning": "_optimizer",
}


def unwrap(optimizer: object) -> Optimizer:
    """The optimizer inside accelerate's and Lightning's wrappers, whose step is the one that runs.

    Raises:
        TypeError: for what is no optimizer.
    """
    for cls in type(optimizer).__mro__:
        name = _WRAPPERS.get(cls.__module__.partition(".")[0])
        if name is not None:
            return unwrap(getattr(optimizer, name))
    if not isinstance(optimizer, Optimizer):
        raise _no_optimizer("attach", optimizer)
    return optimizer


def readable(optimizer: Any, name: str) -> Optimizer:
    """The optimizer or any wrapper of one, whose parameter groups `name` is going to read.

    Raises:
        TypeError: for what has none.
    """
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise _no_optimizer(name, optimizer)
    return optimizer  # type: ignore[no-any-return]


def _no_optimizer(name: str, found: object) -> TypeError:
    return TypeError(
        f"{name}(model, optimizer) needs a torch.optim.Optimizer, not "
        f"{found!r} of type {type(found).__name__}."
    )


def refuse(optimizer: Optimizer) -> None:
    """Refuses by name an optimizer in whose step nothing can act."""
    packages = {cls.__module__.partition(".")[0] for cls in type(optimizer).__mro__}
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if isinstance(optimizer, torch.optim.LBFGS):
        why = "searches along lines on which the penalty would change under it"
        raise PolicyError(_cannot(optimizer, why, "leave the penalties in the loss"))
    if "ZeroRedundancyOptimizer" in names:
        why = "steps a part of the parameters on each rank"
        raise PolicyError(_cannot(optimizer, why, "use fully_shard with a plain optimizer"))
    for package, way_out in _FOREIGN.items():
        if package in packages:
            raise PolicyError(_cannot(optimizer, "steps copies of the parameters", way_out))
    if any(group.get("differentiable") for group in optimizer.param_groups):
        why = "is differentiable, and a step in place would cut its graph"
        raise PolicyError(_cannot(optimizer, why, "leave the penalties in the loss"))
    if not getattr(type(optimizer).step, "hooked", False):
        why = "has a step without torch's hooks"
        raise PolicyError(_cannot(optimizer, why, "call Optimizer.__init__ in its __init__"))


_FOREIGN = {
    "apex": "use torch.optim's fused=True",
    "deepspeed": "leave the penalties in the loss",
}


def _cannot(optimizer: object, why: str, way_out: str) -> str:
    return f"attach: {type(optimizer).__name__} cannot carry penalties: it {why}; {way_out}."


def refuse_without_rate(optimizer: Optimizer, group: Group) -> None:
    """Refuses a group whose learning rate cannot be read."""
    if not isinstance(group.get("lr"), float | int | Tensor):
        why = f"has no learning rate to read (lr={group.get('lr')!r})"
        raise PolicyError(_cannot(optimizer, why, "leave the penalties in the loss"))


class Held:
    """Where each parameter lies among the groups of an optimizer; knows when that has changed."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._lists = [(group["params"], len(group["params"])) for group in optimizer.param_groups]
        self._group = {id(p): i for i, (ps, _) in enumerate(self._lists) for p in ps}

    def is_current(self, optimizer: Optimizer) -> bool:
        """False after `add_param_group`, `load_state_dict` and what replaces parameters."""
        groups = optimizer.param_groups
        return len(groups) == len(self._lists) and all(
            group["params"] is ps and len(ps) == n
            for group, (ps, n) in zip(groups, self._lists, strict=True)
        )

    def group_of(self, w: Tensor) -> int | None:
        """The index of the group that holds the parameter."""
        return self._group.get(id(w))
