"""The doctor: finds policies, optimizers and dropouts that do not do what they look like."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from regwrap.findings import decay, dropouts, strengths
from regwrap.findings.look import SEVERITIES, Finding, Look
from regwrap.optimizers import carriers

__all__ = ["Finding", "doctor"]

_CHECKS: tuple[Callable[[Look], Iterator[Finding]], ...] = (
    decay.twice,
    decay.not_carried,
    decay.stale,
    decay.cancelled,
    decay.on_norms,
    strengths.frozen,
    strengths.not_attached,
    strengths.before_norm,
    strengths.no_zeros,
    strengths.magnitudes,
    strengths.keras,
    strengths.partial,
    strengths.partly_adapted,
    strengths.replaced,
    strengths.idle,
    dropouts.before_batch_norm,
    dropouts.on_output,
    dropouts.never_called,
    dropouts.config_unread,
)


def doctor(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Tensor | float | None = None,
) -> list[Finding]:
    """What does not do what it looks like, most severe first; nothing for a healthy model.

    Works on a model without a policy too: its own dropouts, its optimizer's weight decay. Reads
    only: neither the model nor its modes nor the random state change.

    Args:
        model: with a policy or without one.
        optimizer: the one that trains it; without it nothing is said about weight decay.
        loss: a typical data loss, needed for findings about magnitudes.
    """
    held = None if optimizer is None else carriers.readable(optimizer, "doctor")
    typical = None if loss is None else float(loss)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        look = Look(model, held, typical)
        found = [finding for check in _CHECKS for finding in check(look)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
