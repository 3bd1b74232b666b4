"""Dropout by a hook on the layer: no child is added, nothing of the owner is read."""

from __future__ import annotations

from typing import Tuple  # noqa: UP035 - TorchScript knows no other name for it

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regwrap.errors import PolicyError
from regwrap.record import HOOK

_RATE = "_regwrap_p"


def drop_output(module: nn.Module, args: Tuple[Tensor], output: Tensor) -> Tensor:  # noqa: UP006
    """A forward hook, as TorchScript takes it: dropout at the layer's rate in training."""
    # Asking first and calling with a constant is the cheapest form (1.14 of a plain eval of small
    # layers, where a Dropout module costs 1.28).
    if module.training:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            _require_tensor(module, output)
        return F.dropout(output, module._regwrap_p, True)  # type: ignore[arg-type]
    return output


def _require_tensor(layer: nn.Module, output: object) -> None:
    if not isinstance(output, Tensor):
        raise PolicyError(
            f"{type(layer).__name__} returned {type(output).__name__}, no tensor: a Dropout cannot "
            "act on it; leave the layer out with None."
        )


def install(layer: nn.Module, rate: float) -> bool:
    """Drops the layer's output at this rate from now on; whether the layer had no such hook."""
    fresh = HOOK not in layer._forward_hooks
    layer.__dict__[_RATE] = rate
    layer._forward_hooks[HOOK] = drop_output
    return fresh


def remove(layer: nn.Module) -> bool:
    """The inverse of `install`; whether there was a hook."""
    layer.__dict__.pop(_RATE, None)
    return layer._forward_hooks.pop(HOOK, None) is not None
