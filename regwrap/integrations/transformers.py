"""Hugging Face: a Trainer whose loss has the penalties, at the right share of every micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from regwrap.findings.decay import wanted_rates
from regwrap.findings.look import Look
from regwrap.integrations.common import refuse_second, refuse_uncarried
from regwrap.penalty import reg_loss

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RegularizedTrainerMixin(_Base):
    """Put before any Trainer class: `class MyTrainer(RegularizedTrainerMixin, Trainer)`.

    The model is regularized before (`regularize(model, rules)`); one without a policy trains as it
    would. The penalty joins at the backward, once an optimizer step in total, however the Trainer
    divides or scales its loss under accumulation (`num_items_in_batch`, a `compute_loss_func`,
    label smoothing); clipping sees the whole gradient. The logged `loss` and every evaluation loss
    are free of it; `reg_loss` is logged beside `loss`. `WeightDecay` rules become the
    `weight_decay` of the optimizer that the Trainer makes.

    Raises:
        PolicyError: when `compute_loss` adds `reg_loss` itself, or an optimizer handed to the
            Trainer does not carry a `WeightDecay` rule.
    """

    _regwrap_checked = False
    _regwrap_sum: Tensor | None = None
    _regwrap_count = 0

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, with its share of the penalty in the backward."""
        with self._with_penalty(model):
            return super().training_step(model, *args, **kwargs)

    @contextlib.contextmanager
    def _with_penalty(self, model: nn.Module) -> Iterator[None]:
        """Within it `accelerator.backward` adds the penalty: behind every division by the Trainer.

        Not in `compute_loss`: whether its result is divided by the accumulation steps depends on
        the model's signature and on the version.
        """
        plain = self.accelerator.backward

        def backward(loss: Tensor, **kwargs: Any) -> None:
            if not self._regwrap_checked:
                refuse_second(model, loss, "RegularizedTrainerMixin")
                self._regwrap_checked = True
            penalty = reg_loss(model)
            self._note(penalty)
            plain(loss + penalty / self.current_gradient_accumulation_steps, **kwargs)

        self.accelerator.backward = backward
        try:
            yield
        finally:
            del self.accelerator.backward

    def _note(self, penalty: Tensor) -> None:
        # Summed where it is: a number would wait for the device in every step.
        value = penalty.detach()
        self._regwrap_sum = value if self._regwrap_sum is None else self._regwrap_sum + value
        self._regwrap_count += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the mean penalty since the last time beside the loss."""
        if "loss" in logs and self._regwrap_sum is not None:
            logs["reg_loss"] = self._regwrap_sum.item() / self._regwrap_count
            self._regwrap_sum, self._regwrap_count = None, 0
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with `WeightDecay` rules in its groups."""
        fresh, model = self.optimizer is None, self.model
        optimizer = super().create_optimizer(*args, **kwargs)
        assert model is not None
        if fresh:
            _regroup(optimizer, wanted_rates(Look(model)))
        refuse_uncarried(model, [optimizer])
        return optimizer


class RegularizedTrainer(RegularizedTrainerMixin, Trainer):
    """A `transformers.Trainer` with the penalties of its model; see the mixin."""


def _regroup(optimizer: torch.optim.Optimizer, rates: dict[int, float]) -> None:
    """Gives parameters the decay that their rules say, in groups of their own."""
    for group in list(optimizer.param_groups):
        kept: list[Tensor] = []
        moved: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            rate = rates.get(id(parameter))
            if rate is None or rate == group.get("weight_decay"):
                kept.append(parameter)
            else:
                moved.setdefault(rate, []).append(parameter)
        group["params"] = kept
        for rate, parameters in moved.items():
            optimizer.add_param_group({**group, "params": parameters, "weight_decay": rate})
    # An empty group trips fused optimizers.
    optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
