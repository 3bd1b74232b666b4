"""attach reaches scikit-learn's solutions, support included; hadamard its objective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sparse_problems import Problem, elastic_net, lasso, logistic, multi_task
from torch.optim import LBFGS, SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RMSprop

import regwrap as rw
from regwrap import L1

torch.set_num_threads(1)

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Lasso(0.05) on diabetes": lambda: lasso(0.05),
    "Lasso(0.2) on diabetes": lambda: lasso(0.2),
    "ElasticNet(0.1, 0.5) on diabetes": lambda: elastic_net(0.1, 0.5),
    "MultiTaskLasso(0.15) on diabetes": lambda: multi_task(0.15),
    "LogisticRegression(C=0.02) on breast cancer": lambda: logistic("breast_cancer", 0.02),
    "LogisticRegression(C=0.02) on digits": lambda: logistic("digits", 0.02),
}
# Each optimizer at a rate that suits the curvature L of the data loss: (factory of L, steps). The
# logistic problems have condition numbers in the hundreds, and Adam's momentum has to be as long.
REGRESSION: dict[str, tuple[Callable[[Any, float], Any], int]] = {
    "SGD": (lambda p, c: SGD(p, lr=1 / c), 600),
    "SGD with momentum": (lambda p, c: SGD(p, lr=0.2 / c, momentum=0.9), 800),
    "SGD with nesterov": (lambda p, c: SGD(p, lr=0.2 / c, momentum=0.9, nesterov=True), 800),
    "SGD with dampening": (lambda p, c: SGD(p, lr=0.2 / c, momentum=0.9, dampening=0.5), 1500),
    "Adam": (lambda p, c: Adam(p, lr=0.02), 1500),
    "Adam with amsgrad": (lambda p, c: Adam(p, lr=0.1, amsgrad=True), 3000),
    "AdamW": (lambda p, c: AdamW(p, lr=0.02, weight_decay=0), 1500),
}
LOGISTIC: dict[str, tuple[Callable[[Any, float], Any], int]] = {
    "SGD": (lambda p, c: SGD(p, lr=7 / c), 8000),
    "SGD with momentum": (lambda p, c: SGD(p, lr=4 / c, momentum=0.95), 2500),
    "Adam": (lambda p, c: Adam(p, lr=0.2, betas=(0.98, 0.999)), 3500),
    "AdamW": (lambda p, c: AdamW(p, lr=0.2, betas=(0.98, 0.999), weight_decay=0), 3500),
}
LINEAR = [name for name in PROBLEMS if "Logistic" not in name]
CURVED = [name for name in PROBLEMS if "Logistic" in name]


@functools.cache
def problem(name: str) -> Problem:
    return PROBLEMS[name]()


def solve(
    given: Problem,
    made: tuple[Callable[[Any, float], Any], int],
    *,
    attach: bool,
    rules: Any = None,
) -> Any:
    layer = rw.regularize(given.layer(), given.rules if rules is None else rules)
    make, steps = made
    curvature = torch.linalg.eigvalsh(given.x.T @ given.x / len(given.x)).max().item()
    optimizer = make(layer.parameters(), curvature)
    end = 1.0 if isinstance(optimizer, SGD) else 0.1
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, steps)
    if attach:
        rw.attach(layer, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (given.loss(layer(given.x)) + layer.reg_loss).backward()
        optimizer.step()
        schedule.step()
    return layer.weight.detach().numpy()


def check(given: Problem, w: np.ndarray) -> None:
    assert ((w != 0) == (given.solution != 0)).all()
    assert 0 < (w != 0).sum() < w.size
    assert np.abs(w - given.solution).max() <= 1e-4


@pytest.mark.parametrize("optimizer", list(REGRESSION))
@pytest.mark.parametrize("name", LINEAR)
def test_regression(name: str, optimizer: str) -> None:
    check(problem(name), solve(problem(name), REGRESSION[optimizer], attach=True))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", list(LOGISTIC))
@pytest.mark.parametrize("name", CURVED)
def test_logistic_regression(name: str, optimizer: str) -> None:
    check(problem(name), solve(problem(name), LOGISTIC[optimizer], attach=True))


@pytest.mark.parametrize("optimizer", ["SGD", "SGD with momentum", "Adam", "AdamW"])
def test_l1_in_the_loss_has_no_exact_zeros(optimizer: str) -> None:
    w = solve(problem(LINEAR[0]), REGRESSION[optimizer], attach=False)
    assert (w != 0).all()
    assert np.abs(w - problem(LINEAR[0]).solution).max() <= 0.05


def objective(given: Problem, alpha: float, w: np.ndarray) -> float:
    return given.loss(given.x @ torch.as_tensor(w).T).item() + alpha * float(np.abs(w).sum())


@pytest.mark.parametrize("optimizer", ["SGD with momentum", "Adam", "AdamW"])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_hadamard_reaches_the_objective_with_zeros_that_are_tiny(
    alpha: float, optimizer: str
) -> None:
    given = problem(f"Lasso({alpha}) on diabetes")
    rules = L1(alpha, solver="hadamard")
    w = solve(given, REGRESSION[optimizer], attach=False, rules=rules)
    assert objective(given, alpha, w) <= 1.01 * objective(given, alpha, given.solution)
    assert (w != 0).all()
    # on the very edge, where the data gradient is all but alpha, it is slow: 4e-4, under Adam 3e-6
    assert ((np.abs(w) > 1e-3) == (given.solution != 0)).all()


OTHERS: dict[str, Callable[[Any, float], Any]] = {
    "RMSprop": lambda p, c: RMSprop(p, lr=0.02),
    "Adagrad": lambda p, c: Adagrad(p, lr=0.2),
    "Adadelta": lambda p, c: Adadelta(p, lr=2.0),
    "NAdam": lambda p, c: NAdam(p, lr=0.02),
}


@pytest.mark.parametrize("optimizer", list(OTHERS))
def test_hadamard_serves_optimizers_whose_metric_is_not_known(optimizer: str) -> None:
    given = problem("Lasso(0.05) on diabetes")
    rules = L1(0.05, solver="hadamard")
    w = solve(given, (OTHERS[optimizer], 800), attach=False, rules=rules)
    assert objective(given, 0.05, w) <= 1.01 * objective(given, 0.05, given.solution)


def test_hadamard_serves_lbfgs_which_attach_refuses() -> None:
    given = problem("Lasso(0.05) on diabetes")
    layer = rw.regularize(given.layer(), L1(0.05, solver="hadamard"))
    optimizer = LBFGS(layer.parameters(), line_search_fn="strong_wolfe", max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = given.loss(layer(given.x)) + rw.reg_loss(layer)
        loss.backward()
        return loss

    optimizer.step(closure)
    w = layer.weight.detach().numpy()
    assert objective(given, 0.05, w) <= 1.01 * objective(given, 0.05, given.solution)
