"""The rate of a dropout that the model has already."""

from __future__ import annotations

from torch import nn

from regwrap import record
from regwrap.planning.dropouts import rate_of
from regwrap.terms import Dropout

_OLD = "_regwrap_rate"


def sync(module: nn.Module) -> None:
    """Gives the module the rate that its record asks for, or the one that its author gave it."""
    marks = [m for m in record.read(module).marks if m.mechanism == "direct"]
    rates = [_rate(module, m, m.term.p) for m in marks if isinstance(m.term, Dropout)]
    if not rates:
        revert(module)
        return
    name = rate_of(module)
    assert name is not None
    module.__dict__.setdefault(_OLD, (name, module.__dict__[name]))
    module.__dict__[name] = rates[0]


def _rate(module: nn.Module, mark: record.Mark, p: float) -> float:
    factor = record.read(module).factor(mark)
    return p if factor is None else p * factor.value


def revert(module: nn.Module) -> None:
    """Gives the module back the rate of its author."""
    if _OLD in module.__dict__:
        name, rate = module.__dict__.pop(_OLD)
        module.__dict__[name] = rate
