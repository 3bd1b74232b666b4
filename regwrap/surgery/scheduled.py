"""Dropout at a rate that a schedule moves, read live from its factor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regwrap.planning.dropouts import rate_of
from regwrap.record import Factor


def drop(x: Tensor, rate: float, factor: Factor) -> Tensor:
    """Dropout at the rate times the factor, without compiling anew for each value."""
    if torch.compiler.is_compiling():
        # A float rate is compiled in, anew for each value (and refused at the eighth); F.dropout
        # takes no tensor. A mask drawn by hand against a tensor is one graph for all rates.
        return _drawn(x, rate * factor.tensor)
    return F.dropout(x, rate * factor.value, True)


def _drawn(x: Tensor, rate: Tensor) -> Tensor:
    rate = rate.to(x.device, torch.float32)
    # float32, since half precision draws numbers in steps of 1/256 (bfloat16)
    drawn = torch.rand(x.shape, device=x.device, dtype=torch.float32)
    return x * ((drawn >= rate) / (1 - rate)).to(x.dtype)


def set_rate(dropout: nn.Module, rate: float, factor: Factor | None) -> None:
    """Gives a dropout of any class the present value of its rate."""
    name = rate_of(dropout)
    if factor is not None and name is not None:
        dropout.__dict__[name] = rate * factor.value


class ScheduledDropout(nn.Dropout):
    """An inserted dropout whose rate a schedule moves."""

    def __init__(self, p: float, factor: Factor) -> None:
        super().__init__(p)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Dropout at the rate times the factor of the moment."""
        return drop(x, self.p, self.factor) if self.training else x


class ScheduledDropoutOfKind(ScheduledDropout):
    """The same for a dropout of another class, which lies beside the children, as behind a hook."""

    def __init__(self, kind: type[nn.Module], p: float, factor: Factor) -> None:
        super().__init__(p, factor)
        self.__dict__["dropout"] = kind(p)

    def forward(self, x: Tensor) -> Tensor:
        """The dropout at the rate times the factor of the moment."""
        dropout: nn.Module = self.__dict__["dropout"]
        set_rate(dropout, self.p, self.factor)
        dropped: Tensor = dropout.train(self.training)(x)
        return dropped


def made(kind: type[nn.Module], p: float, factor: Factor) -> ScheduledDropout:
    """A dropout to insert, of the class that was asked for."""
    if kind is nn.Dropout:
        return ScheduledDropout(p, factor)
    return ScheduledDropoutOfKind(kind, p, factor)
