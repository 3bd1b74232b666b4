"""Dropout by a hook on the layer: no child is added, nothing of the owner is read."""

from __future__ import annotations

from typing import Any, Tuple  # noqa: UP035 - TorchScript knows no other name for it

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regwrap.errors import PolicyError
from regwrap.record import HOOK, Factor

_RATE = "_regwrap_p"
_FACTOR = "_regwrap_factor"


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


def drop_scheduled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook: dropout at the layer's rate times its factor of the moment."""
    if not module.training:
        return output
    _require_tensor(module, output)
    rate: float = module.__dict__[_RATE]
    factor: Factor = module.__dict__[_FACTOR]
    if torch.compiler.is_compiling():
        # A float rate is compiled in, anew for each value (and refused at the eighth); F.dropout
        # takes no tensor. A mask drawn by hand against a tensor is one graph for all rates.
        return _drawn(output, rate * factor.tensor)
    return F.dropout(output, rate * factor.value, True)


def _drawn(output: Tensor, rate: Tensor) -> Tensor:
    rate = rate.to(output.device, torch.float32)
    # float32, since half precision draws numbers in steps of 1/256 (bfloat16)
    drawn = torch.rand(output.shape, device=output.device, dtype=torch.float32)
    return output * ((drawn >= rate) / (1 - rate)).to(output.dtype)


def install(layer: nn.Module, rate: float, factor: Factor | None = None) -> bool:
    """Drops the layer's output at this rate from now on; whether the hook is another than before.

    With a factor, which a schedule moves, the hook reads it at every call.
    """
    hook = drop_output if factor is None else drop_scheduled
    fresh = layer._forward_hooks.get(HOOK) is not hook
    layer.__dict__[_RATE] = rate
    layer.__dict__.pop(_FACTOR, None)
    if factor is not None:
        layer.__dict__[_FACTOR] = factor
    layer._forward_hooks[HOOK] = hook
    return fresh


def remove(layer: nn.Module) -> bool:
    """The inverse of `install`; whether there was a hook."""
    layer.__dict__.pop(_RATE, None)
    layer.__dict__.pop(_FACTOR, None)
    return layer._forward_hooks.pop(HOOK, None) is not None
