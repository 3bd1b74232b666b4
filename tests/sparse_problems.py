"""Problems whose solutions scikit-learn knows, as a Linear layer, a data loss and rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import datasets, linear_model
from torch import Tensor, nn

from regwrap import L1, ElasticNet, GroupLasso


@dataclass(frozen=True, eq=False)
class Problem:
    """min over w: loss(w) + the rules' penalty, and scikit-learn's solution of it."""

    x: Tensor
    loss: Callable[[Tensor], Tensor]
    """Of the layer's output."""
    rules: Any
    solution: np.ndarray
    """Shaped like the layer's weight."""
    intercept: bool = False

    def layer(self) -> nn.Linear:
        """The model, in double precision, from zero."""
        outputs, inputs = self.solution.shape
        layer = nn.Linear(inputs, outputs, bias=self.intercept).double()
        torch.nn.init.zeros_(layer.weight)
        if self.intercept:
            torch.nn.init.zeros_(layer.bias)
        return layer


def _diabetes() -> tuple[np.ndarray, np.ndarray]:
    x, y = datasets.load_diabetes(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def _regression(target: np.ndarray) -> Callable[[Tensor], Tensor]:
    wanted = torch.tensor(target)
    return lambda out: (out - wanted).square().sum(1).mean() / 2


def lasso(alpha: float) -> Problem:
    """1/(2n) |y - Xw|^2 + alpha |w|_1."""
    x, y = _diabetes()
    fit = linear_model.Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(x, y)
    return Problem(torch.tensor(x), _regression(y[:, None]), L1(alpha), fit.coef_[None])


def elastic_net(alpha: float, ratio: float) -> Problem:
    """1/(2n) |y - Xw|^2 + alpha (ratio |w|_1 + (1 - ratio)/2 |w|^2)."""
    x, y = _diabetes()
    fit = linear_model.ElasticNet(
        alpha=alpha, l1_ratio=ratio, fit_intercept=False, tol=1e-14, max_iter=10**6
    ).fit(x, y)
    rules = ElasticNet(alpha, ratio)
    return Problem(torch.tensor(x), _regression(y[:, None]), rules, fit.coef_[None])


def multi_task(alpha: float, tasks: int = 4) -> Problem:
    """1/(2n) |Y - XW|_F^2 + alpha * sum over features of norm2(row of W); GroupLasso(dim=1)."""
    x, y = _diabetes()
    rng = np.random.default_rng(0)
    mixed = y[:, None] * rng.uniform(0.5, 1.5, tasks) + x[:, [3]] * rng.normal(size=tasks)
    mixed += 0.5 * rng.normal(size=mixed.shape)
    mixed -= mixed.mean(0)
    fit = linear_model.MultiTaskLasso(
        alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=10**6
    ).fit(x, mixed)
    # ours weighs a group of `tasks` elements with sqrt(tasks)
    rules = GroupLasso(alpha / tasks**0.5, dim=1)
    return Problem(torch.tensor(x), _regression(mixed), rules, fit.coef_)


def logistic(name: str, c: float) -> Problem:
    """Mean cross-entropy + |w|_1 / (C n); two classes of the digits."""
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    if name == "digits":
        x, y = x[y < 2], y[y < 2]
    x = x[:, x.std(0) > 0]
    x = (x - x.mean(0)) / x.std(0)
    fit = linear_model.LogisticRegression(
        C=c, l1_ratio=1, solver="saga", tol=1e-10, max_iter=10**6, fit_intercept=False
    ).fit(x, y)
    wanted = torch.tensor(y, dtype=torch.float64)[:, None]
    rules = L1(1 / (c * len(y)))
    return Problem(
        torch.tensor(x),
        lambda out: F.binary_cross_entropy_with_logits(out, wanted),
        rules,
        fit.coef_,
    )
