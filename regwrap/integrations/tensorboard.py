"""TensorBoard: what regularizes a model, over the steps; any writer with two methods will do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regwrap import sites, table
from regwrap.api import policy
from regwrap.findings.look import factor_now, site_path
from regwrap.graph import is_dropout
from regwrap.penalty import penalties, reg_loss
from regwrap.planning.dropouts import rate_of
from regwrap.record import Entry
from regwrap.terms import Dropout, WeightTerm


class Writer(Protocol):
    """The part of `torch.utils.tensorboard.SummaryWriter` that is needed."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> None:
        """One number of a step."""

    def add_text(self, tag: str, text_string: str, global_step: int | None = None) -> None:
        """One text of a step, as Markdown."""


def log_policy(writer: Writer, model: nn.Module, step: int) -> None:
    """Writes what acts on the model now; for every epoch rather than for every step.

    Tags: `regwrap/reg_loss`, `regwrap/penalty/<site>` (also of what an optimizer carries, which
    `reg_loss` leaves out), `regwrap/sparsity/<site>` (the share of exact zeros),
    `regwrap/dropout/<path>`, and the policy table as text, `regwrap/policy`.

    Args:
        writer: a `SummaryWriter`.
        model: with a policy.
        step: the global step.
    """
    for tag, value in _scalars(model):
        writer.add_scalar(f"regwrap/{tag}", value, step)
    writer.add_text("regwrap/policy", _table(model), step)


def _scalars(model: nn.Module) -> Iterator[tuple[str, float]]:
    root = sites.unwrap(model)
    with torch.no_grad():
        yield "reg_loss", reg_loss(model).item()
        for site, value in penalties(model, attached=True).items():
            yield f"penalty/{site}", value.item()
        for path, tensor in _penalised(root, policy(model)).items():
            yield f"sparsity/{path}", (tensor == 0).float().mean().item()
    yield from _dropouts(root, policy(model))


def _penalised(root: nn.Module, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Penalised parameters by their site, each once."""
    read = (
        (site_path(e), sites.read(root.get_submodule(e.path), str(e.site)))
        for e in entries
        if isinstance(e.term, WeightTerm) and e.shape is not None
    )
    return {path: tensor for path, tensor in read if tensor is not None}


def _dropouts(root: nn.Module, entries: Iterable[Entry]) -> Iterator[tuple[str, float]]:
    """The rates of the policy's dropouts and of the model's own, those in attributes too."""
    acting = (e for e in entries if isinstance(e.term, Dropout) and e.mechanism)
    ruled = {e.path: _rate_now(root, e) for e in acting}
    for path, module in root.named_modules():
        mine = path.rpartition(".")[2].startswith("regwrap_dropout")  # under its layer's path
        rate = ruled.get(path, None if mine else _own_rate(module))
        if rate is not None:
            yield f"dropout/{path}", rate


def _own_rate(module: nn.Module) -> float | None:
    """The rate of a dropout, and one above 0 that another module keeps, as attention does."""
    name = rate_of(module)
    rate = None if name is None else float(getattr(module, name))
    return rate or (rate if is_dropout(module) else None)


def _rate_now(root: nn.Module, entry: Entry) -> float:
    assert isinstance(entry.term, Dropout)
    return entry.term.p * factor_now(root.get_submodule(entry.path), entry)


def _table(model: nn.Module) -> str:
    """The table as a Markdown block of code."""
    return "".join(f"    {line}\n" for line in table.plain(policy(model).sheet()).splitlines())
