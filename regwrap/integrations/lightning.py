"""Lightning: penalties join the loss behind `training_step`, without a change of it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from regwrap.api import regularize
from regwrap.integrations.common import refuse_second, refuse_uncarried
from regwrap.penalty import reg_loss


class RegularizationCallback(Callback):
    """Adds a module's penalties to the loss of every backward, and logs them as `reg_loss`.

    With automatic optimization each micro-batch gets its share (1 / `accumulate_grad_batches`), as
    Lightning does with the loss; clipping sees the whole gradient. What `training_step` logs as its
    loss is free of the penalty. With manual optimization every `manual_backward` adds the penalties
    of what is trainable then (`toggle_optimizer`), divided by `accumulate`.

    Args:
        rules: for `regularize`, with paths from the LightningModule (`"model.head"`); None where
            the module, or a part of it, is regularized already.
        log: whether to log `reg_loss` in every step.
        accumulate: how many backwards a step of a manual optimization has.

    Raises:
        PolicyError: at the start, for a `WeightDecay` rule that no optimizer carries; at the first
            batch, when `training_step` adds `reg_loss` itself.
    """

    def __init__(self, rules: Any = None, *, log: bool = True, accumulate: int = 1) -> None:
        self._rules = rules
        self._logs = log  # not self.log: Lightning puts a method there
        self._accumulate = accumulate
        self._checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Regularizes before the optimizers are made; behind `configure_model`, if there is one."""
        if self._rules is None or stage != "fit":
            return
        if type(pl_module).configure_model is LightningModule.configure_model:
            self._regularize(pl_module)
        else:
            self._wait_for_layers(pl_module)

    def _regularize(self, pl_module: LightningModule) -> None:
        regularize(pl_module, self._rules)
        self._rules = None  # a second fit of the same callback adds nothing

    def _wait_for_layers(self, pl_module: LightningModule) -> None:
        make_layers = pl_module.configure_model

        @functools.wraps(make_layers)
        def configure_model() -> None:
            del pl_module.__dict__["configure_model"]  # nothing of this stays behind
            make_layers()
            if self._rules is not None:
                self._regularize(pl_module)

        pl_module.__dict__["configure_model"] = configure_model

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses `WeightDecay` rules that act nowhere."""
        self._checked = False
        refuse_uncarried(pl_module, trainer.optimizers)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Adds the penalty to the loss, in place: there is no other way to reach it."""
        if not self._checked:
            refuse_second(pl_module, loss, "RegularizationCallback")
            self._checked = True
        with torch.autocast(loss.device.type, enabled=False):
            penalty = reg_loss(pl_module)
        if penalty.requires_grad:
            loss.add_(penalty * (_loss_scale(trainer) / self._parts(trainer, pl_module)))
        if self._logs:
            pl_module.log("reg_loss", penalty.detach())

    def _parts(self, trainer: Trainer, pl_module: LightningModule) -> int:
        automatic = pl_module.automatic_optimization
        return trainer.accumulate_grad_batches if automatic else self._accumulate


def _loss_scale(trainer: Trainer) -> float:
    """By what the loss is multiplied already: under 16-mixed the hook sees it scaled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
