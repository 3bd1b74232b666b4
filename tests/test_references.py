"""What Keras 3 and scikit-learn compute, against what we do.

`fixtures/keras.json` was written by Keras itself, by `fixtures/make_keras.py`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import linear_model
from torch import Tensor, nn

import regwrap as rw
from regwrap import L1, L2, ElasticNet, Orthogonal

KERAS = json.loads(Path(__file__).with_name("fixtures").joinpath("keras.json").read_text())["cases"]


# ---- Keras -----------------------------------------------------------------------------------


def terms_of(case: dict[str, Any], **how: Any) -> tuple[Any, ...]:
    """Ours for a regularizer of Keras, whose L2 has no 1/2."""
    arguments = case["arguments"]
    if case["kind"] == "OrthogonalRegularizer":
        return (Orthogonal(arguments["factor"]),)
    return (
        *([L1(arguments["l1"], **how)] if "l1" in arguments else []),
        *([L2(2 * arguments["l2"], **how)] if "l2" in arguments else []),
    )


def named(case: dict[str, Any]) -> str:
    shape = np.shape(case["at"]) if "at" in case else [np.shape(x) for x in case["inputs"]]
    told = "-".join(f"{name}={value}" for name, value in case["arguments"].items())
    return f"{case['on']}-{case['kind']}-{told}-{shape}-{case.get('activation', '')}"


def close(found: Tensor, wanted: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-6, atol=1e-6)


def cases_on(what: str) -> Any:
    cases = [case for case in KERAS if case["on"] == what]
    return pytest.mark.parametrize("case", cases, ids=map(named, cases))


def test_there_are_at_least_60_cases() -> None:
    assert len(KERAS) >= 60
    kinds = {(case["on"], case["kind"]) for case in KERAS}
    assert {kind for _, kind in kinds} == {"L1", "L2", "L1L2", "OrthogonalRegularizer"}
    assert {("output", kind) for kind in ("L1", "L2", "L1L2")} <= kinds


class Holder(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)


@cases_on("weight")
def test_a_weight_penalty_is_that_of_keras(case: dict[str, Any]) -> None:
    """Our rows are Keras' rows; its columns are the rows of the transposed matrix."""
    across = case["arguments"].get("mode") == "columns"
    w = torch.tensor(case["at"])
    model = rw.regularize(Holder(w.T.contiguous() if across else w), {"w": terms_of(case)})
    loss = model.reg_loss
    close(loss, case["value"])
    loss.backward()
    if case["gradient"] is None:
        assert model.w.grad.isfinite().all()
    else:
        close(model.w.grad.T if across else model.w.grad, case["gradient"])


@cases_on("output")
def test_an_output_penalty_is_that_of_keras(case: dict[str, Any]) -> None:
    class Dense(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.tanh() if case["activation"] == "tanh" else y

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = Dense(4, 3)

        def forward(self, *xs: Tensor) -> list[Tensor]:
            return [self.dense(x) for x in xs]

    model = Calls()
    kernel, bias = torch.tensor(case["kernel"]), torch.tensor(case["bias"])
    model.dense.load_state_dict({"weight": kernel.T, "bias": bias})
    rw.regularize(model, {"dense": terms_of(case, on="output")})
    model(*map(torch.tensor, case["inputs"]))
    loss = model.reg_loss
    close(loss, case["value"])
    loss.backward()
    close(model.dense.weight.grad.T, case["gradient"])


# ---- scikit-learn ----------------------------------------------------------------------------


def regression(n: int = 80, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    y = x @ np.array([2.0, -1.0, 0.5, 0.0, 0.0, 0.3]) + 0.5 + 0.3 * rng.normal(size=n)
    return x, y


def at(coefficients: np.ndarray, intercept: Any, rules: Any) -> nn.Linear:
    """A Linear layer at scikit-learn's optimum, regularized; the bias is not, as there."""
    coefficients = np.atleast_2d(coefficients)
    model = nn.Linear(coefficients.shape[1], coefficients.shape[0], dtype=torch.float64)
    model.load_state_dict(
        {"weight": torch.as_tensor(coefficients), "bias": torch.as_tensor(intercept).reshape(-1)}
    )
    return rw.regularize(model, rules)


def assert_optimal(model: nn.Linear, loss: Tensor, wanted: float) -> None:
    """Its objective to 1e-6, and no direction to go down: zero lies in the subgradient."""
    total = loss + model.reg_loss
    assert total.item() == pytest.approx(wanted, rel=1e-6)
    total.backward()
    assert model.bias.grad.abs().max() < 1e-6
    slack = sum(e.term.strength for e in rw.policy(model) if isinstance(e.term, L1))
    at_zero = model.weight == 0
    assert model.weight.grad[~at_zero].abs().max() < 1e-6
    assert not at_zero.any() or model.weight.grad[at_zero].abs().max() <= slack


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_ridge(alpha: float) -> None:
    x, y = regression()
    fit = linear_model.Ridge(alpha, tol=1e-12).fit(x, y)
    model = at(fit.coef_, fit.intercept_, L2(2 * alpha / len(y)))
    loss = F.mse_loss(model(torch.as_tensor(x))[:, 0], torch.as_tensor(y))
    theirs = np.square(y - fit.predict(x)).sum() + alpha * np.square(fit.coef_).sum()
    assert_optimal(model, loss, theirs / len(y))


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.4])
def test_lasso(alpha: float) -> None:
    x, y = regression()
    fit = linear_model.Lasso(alpha, tol=1e-12, max_iter=100_000).fit(x, y)
    model = at(fit.coef_, fit.intercept_, L1(alpha))
    loss = F.mse_loss(model(torch.as_tensor(x))[:, 0], torch.as_tensor(y)) / 2
    theirs = np.square(y - fit.predict(x)).sum() / (2 * len(y)) + alpha * np.abs(fit.coef_).sum()
    assert_optimal(model, loss, theirs)


@pytest.mark.parametrize("alpha", [0.05, 0.4])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_elastic_net(alpha: float, ratio: float) -> None:
    x, y = regression()
    fit = linear_model.ElasticNet(alpha, l1_ratio=ratio, tol=1e-12, max_iter=100_000).fit(x, y)
    model = at(fit.coef_, fit.intercept_, ElasticNet(alpha, ratio))
    loss = F.mse_loss(model(torch.as_tensor(x))[:, 0], torch.as_tensor(y)) / 2
    theirs = (
        np.square(y - fit.predict(x)).sum() / (2 * len(y))
        + alpha * ratio * np.abs(fit.coef_).sum()
        + alpha * (1 - ratio) / 2 * np.square(fit.coef_).sum()
    )
    assert_optimal(model, loss, theirs)


def test_elastic_net_of_ratio_zero_and_one_is_ridge_and_lasso() -> None:
    x, y = regression()
    lasso = linear_model.Lasso(0.1, tol=1e-12, max_iter=100_000).fit(x, y)
    model = at(lasso.coef_, lasso.intercept_, ElasticNet(0.1, 1.0))
    assert model.reg_loss.item() == pytest.approx(0.1 * np.abs(lasso.coef_).sum())
    rw.regularize(model, ElasticNet(0.1, 0.0))
    assert model.reg_loss.item() == pytest.approx(0.05 * np.square(lasso.coef_).sum())


@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("l1_ratio", [0.0, 1.0])
def test_logistic_regression(c: float, l1_ratio: float) -> None:
    x, y = regression()
    y = (y > 0.5).astype(int)
    n = len(y)
    fit = linear_model.LogisticRegression(
        C=c, l1_ratio=l1_ratio, solver="saga", tol=1e-10, max_iter=200_000
    ).fit(x, y)
    rule = L2(1 / (c * n)) if l1_ratio == 0 else L1(1 / (c * n))
    model = at(fit.coef_, fit.intercept_, rule)
    loss = F.binary_cross_entropy_with_logits(
        model(torch.as_tensor(x))[:, 0], torch.as_tensor(y, dtype=torch.float64)
    )
    chosen = fit.predict_proba(x)[np.arange(n), y]
    norm = np.square(fit.coef_).sum() / 2 if l1_ratio == 0 else np.abs(fit.coef_).sum()
    assert_optimal(model, loss, (-np.log(chosen).sum() * c + norm) / (c * n))


def test_multinomial_logistic_regression() -> None:
    x, y = regression()
    y = np.digitize(y, [-0.5, 1.5])
    fit = linear_model.LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000).fit(x, y)
    model = at(fit.coef_, fit.intercept_, L2(1 / (0.5 * len(y))))
    loss = F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y))
    chosen = fit.predict_proba(x)[np.arange(len(y)), y]
    theirs = -np.log(chosen).mean() + np.square(fit.coef_).sum() / (2 * 0.5 * len(y))
    assert_optimal(model, loss, theirs)


# ---- PyTorch's own weight_decay, d2l's -------------------------------------------------------


def test_l2_in_the_loss_is_sgds_weight_decay() -> None:
    models = [nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    rw.regularize(models[0], L2(0.3, on="all"))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for model, decay in zip(models, (0.0, 0.3), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x).square().mean() + rw.reg_loss(model)).backward()
            optimizer.step()
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_l2_is_the_l2_penalty_of_d2l() -> None:
    """Its `lambd * l2_penalty(w)` with `l2_penalty(w) = (w ** 2).sum() / 2`."""
    model = rw.regularize(nn.Linear(4, 1), L2(3.0))
    torch.testing.assert_close(model.reg_loss, 3.0 * (model.weight**2).sum() / 2)
