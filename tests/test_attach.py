"""Penalties in the optimizer's step: the same numbers as by hand, exact zeros, every trap."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import regwrap as rw
from regwrap import (
    L1,
    L2,
    L2SP,
    DropConnect,
    Dropout,
    GroupLasso,
    MaxNorm,
    Orthogonal,
    WeightDecay,
    proximal,
)
from regwrap.proximal import Metric

torch.set_num_threads(1)

Make = Callable[[Any], torch.optim.Optimizer]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def data(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


def data_loss(model: nn.Module, i: int) -> Tensor:
    x, y = data(i)
    return (model(x) - y).square().mean()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20, *, start: int = 0
) -> nn.Module:
    for i in range(start, start + steps):
        optimizer.zero_grad()
        (data_loss(model, i) + rw.reg_loss(model)).backward()
        optimizer.step()
    return model


def attached(rules: Any, make: Make, steps: int = 20) -> nn.Module:
    model = rw.regularize(net(), rules)
    optimizer = make(model.parameters())
    rw.attach(model, optimizer)
    return train(model, optimizer, steps)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def gap(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


# ---- L2, L2SP: in the gradient -----------------------------------------------------------------

SGDS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3},
    {"maximize": True},
    {"momentum": 0.9, "maximize": True},
    {"foreach": False},
    {"foreach": True, "momentum": 0.9},
]


@pytest.mark.parametrize("how", SGDS, ids=str)
def test_l2_is_bit_equal_to_sgd_weight_decay(how: dict[str, Any]) -> None:
    ours = attached(L2(0.1, on="all"), lambda p: SGD(p, lr=0.01, **how))
    plain = net()
    train(plain, SGD(plain.parameters(), lr=0.01, weight_decay=0.1, **how))
    assert same_bits(ours, plain)


def test_l2_on_weights_is_bit_equal_to_groups_written_by_hand() -> None:
    ours = attached(L2(0.1), lambda p: SGD(p, lr=0.1))
    plain = net()
    weights = [plain.a.weight, plain.b.weight]
    rest = [plain.a.bias, plain.norm.weight, plain.norm.bias, plain.b.bias]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest}]
    train(plain, SGD(groups, lr=0.1))
    assert same_bits(ours, plain)


@pytest.mark.parametrize("how", [{}, {"amsgrad": True}, {"maximize": True}, {"foreach": True}])
def test_l2_equals_coupled_adam(how: dict[str, Any]) -> None:
    ours = attached(L2(0.1, on="all"), lambda p: Adam(p, lr=0.01, **how))
    plain = net()
    train(plain, Adam(plain.parameters(), lr=0.01, weight_decay=0.1, **how))
    assert gap(ours, plain) <= 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.1, fused=True),
        lambda p: Adam(p, lr=0.01, fused=True),
        lambda p: AdamW(p, lr=0.01),
        lambda p: AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.01),
    ],
)
@pytest.mark.parametrize("term", [L2(0.1), L2SP(0.1)])
def test_in_the_step_equals_in_the_loss(make: Make, term: Any) -> None:
    ours = attached(term, make)
    in_loss = rw.regularize(net(), term)
    train(in_loss, make(in_loss.parameters()))
    assert gap(ours, in_loss) <= 2e-5  # sqrt(v) near zero doubles rounding under Adam


def test_gradients_are_as_before_afterwards() -> None:
    model = rw.regularize(net(), L2(0.1) + L2SP(0.2) + L1(0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    rw.attach(model, optimizer)
    data_loss(model, 0).backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    assert all(
        p.grad is grad and torch.equal(p.grad, values)
        for p, (grad, values) in zip(model.parameters(), before, strict=True)
    )


# ---- WeightDecay, MaxNorm ----------------------------------------------------------------------


def test_decay_is_left_to_a_group_that_has_it() -> None:
    def make(model: nn.Module) -> AdamW:
        return AdamW(rw.param_groups(model), lr=0.01)

    ours, plain = (rw.regularize(net(), WeightDecay(0.3)) for _ in range(2))
    optimizer = make(ours)
    rw.attach(ours, optimizer)
    train(ours, optimizer)
    train(plain, make(plain))
    assert same_bits(ours, plain)


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_decay_is_decoupled_where_the_group_has_none(cls: type[Adam]) -> None:
    ours = attached(WeightDecay(0.3, on="all"), lambda p: cls(p, lr=0.01, weight_decay=0))
    plain = net()
    train(plain, AdamW(plain.parameters(), lr=0.01, weight_decay=0.3))
    assert gap(ours, plain) <= 1e-6


def test_decay_is_refused_where_the_group_has_another() -> None:
    model = rw.regularize(net(), WeightDecay(0.3))
    message = (
        r"attach: WeightDecay\(0\.3\) on 'a\.weight' meets weight_decay=0\.01 in the optimizer's "
        r"group 0; give that group weight_decay=0\.3 or 0, or make the optimizer from "
        r"regwrap\.param_groups\(model\)\."
    )
    with pytest.raises(rw.PolicyError, match=message):
        rw.attach(model, AdamW(model.parameters(), lr=0.01))
    assert rw.policy(model).rows()[0]["mechanism"] == "optimizer"


def keras_max_norm(w: np.ndarray, limit: float, axis: Any) -> np.ndarray:
    """`keras.constraints.MaxNorm.__call__`, keras/src/constraints/constraints.py."""
    norms = np.sqrt(np.sum(np.square(w), axis=axis, keepdims=True))
    desired = np.clip(norms, 0, limit)
    return w * (desired / (1e-7 + norms))


@pytest.mark.parametrize("limit", [0.5, 2.0, 100.0])
@pytest.mark.parametrize(
    ("shape", "dim", "axis"),
    [((8, 5), 0, 1), ((8, 5), 1, 0), ((4, 3, 2, 2), 0, (1, 2, 3)), ((4, 3, 2, 2), -3, (0, 2, 3))],
)
def test_max_norm_projects_as_keras_does(limit: float, shape: Any, dim: int, axis: Any) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = keras_max_norm(w.numpy().copy(), limit, axis)
    MaxNorm(limit, dim=dim).project_([w])
    assert np.abs(w.numpy() - expected).max() <= 1e-6


def test_max_norm_leaves_the_bits_of_units_within_the_limit() -> None:
    w = torch.randn(8, 5)
    before = w.clone()
    MaxNorm(100.0).project_([w])
    assert torch.equal(w, before)


def test_max_norm_holds_after_every_step() -> None:
    model = rw.regularize(net(), {"a": MaxNorm(0.3)})
    optimizer = SGD(model.parameters(), lr=1.0)
    assert rw.policy(model).rows()[0]["note"] == "acts once attach(model, optimizer) is called"
    rw.attach(model, optimizer)
    assert rw.policy(model).rows()[0]["note"] == ""
    for i in range(5):
        train(model, optimizer, 1, start=i)
        assert model.a.weight.norm(dim=1).max() <= 0.3 + 1e-6
    assert model.b.weight.norm(dim=1).max() > 0.3


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: MaxNorm(-1), "MaxNorm: limit must be a finite number >= 0, not -1."),
        (lambda: MaxNorm(1, dim=0.5), "MaxNorm: dim must be an integer, not 0.5"),
        (lambda: MaxNorm(1, on="output"), "MaxNorm: on='output' is not possible here"),
    ],
)
def test_max_norm_refuses_bad_arguments(make: Callable[[], MaxNorm], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error.replace("(", r"\(")):
        make()


def test_max_norm_is_a_value() -> None:
    assert (
        eval(repr(MaxNorm(2, dim=1)))
        == MaxNorm(2.0, 1)
        == pickle.loads(pickle.dumps(MaxNorm(2, 1)))
    )
    with pytest.raises(rw.PolicyError, match=r"has shape .* and no dim 2; give a dim"):
        rw.regularize(net(), MaxNorm(1, dim=2))


# ---- the proximal steps, against the formula in float64 ----------------------------------------


def d_of(moment: Tensor, metric: Metric) -> Tensor:
    d = moment.double().sqrt() * metric.correction + metric.eps
    return torch.where(moment > 0, d, torch.inf)


def soft(z: Tensor, t: Tensor | float) -> Tensor:
    return z.double().sign() * (z.double().abs() - t).clamp_min(0)


SHAPES = [
    pytest.param([(7, 3)] * 5 + [(2,), ()], id="small"),
    pytest.param([(1000, 1300), (3,)], id="longer than a span"),
    pytest.param([(300, 300), (0, 4)], id="one view, one empty"),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_soft_threshold(shapes: Any, dtype: torch.dtype, adaptive: bool) -> None:
    torch.manual_seed(0)
    ws = [torch.randn(s).to(dtype) for s in shapes]
    moments = [torch.rand(s).to(dtype) * (torch.rand(s) > 0.1) for s in shapes]
    metric = Metric(0.1, moments if adaptive else None, 1.7, 1e-8)
    expected = [
        soft(w, 0.2 / d_of(v, metric) if adaptive else 0.2)
        for w, v in zip(ws, moments, strict=True)
    ]
    L1(2.0).shrink_(ws, metric)
    close = 4 * torch.finfo(dtype).eps if dtype.itemsize > 2 else torch.finfo(dtype).eps
    for w, e in zip(ws, expected, strict=True):
        assert torch.allclose(w.double(), e, rtol=close, atol=close)


@pytest.mark.parametrize("n", [100, 90_000])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded moment"])
def test_soft_threshold_of_every_layout(n: int, layout: str) -> None:
    w = torch.randn(2, n, 2, 2)
    moment = torch.rand(2, n, 2, 2)
    if layout == "channels_last":
        w, moment = (t.contiguous(memory_format=torch.channels_last) for t in (w, moment))
    elif layout == "transposed":
        w, moment = w.transpose(0, 1), moment.transpose(0, 1).contiguous()
    elif layout == "strided":
        w, moment = torch.randn(2, n, 2, 4)[..., ::2], moment
    else:
        moment = torch.ones(()).expand(w.shape)
    metric = Metric(0.1, [moment], 1.0, 1e-8)
    expected = soft(w, 0.1 / d_of(moment, metric))
    L1(1.0).shrink_([w], metric)
    assert torch.allclose(w.double(), expected, atol=1e-6)


def test_what_never_had_a_gradient_keeps_its_bits() -> None:
    for n in (50, 200_000):
        w, moment = torch.randn(n), torch.zeros(n)
        w[:20] *= 1e-12
        moment[::7] = 1.0
        before = w.clone()
        L1(1.0).shrink_([w], Metric(0.1, [moment], 3.3, 1e-8))
        assert torch.equal(w[moment == 0], before[moment == 0])
        assert not torch.equal(w, before)


def group_reference(z: Tensor, t: float, d: Tensor) -> Tensor:
    """The same equation by bisection in float64, one row after the other."""
    rows = []
    for zi, di in zip(z.double(), d.double(), strict=True):
        if (di * zi).norm() <= t:
            rows.append(torch.zeros_like(zi))
            continue
        low, high = 0.0, zi.norm().item()
        for _ in range(200):
            r = (low + high) / 2
            low, high = (r, high) if (zi / (r + t / di)).norm() > 1 else (low, r)
        rows.append(zi * r / (r + t / di))
    return torch.stack(rows)


@pytest.mark.parametrize("decades", [0, 1, 3, 6])
def test_group_step_in_the_diagonal_metric(decades: int) -> None:
    torch.manual_seed(decades)
    z = torch.randn(500, 6, dtype=torch.float64) * torch.rand(500, 1, dtype=torch.float64) * 2
    d = 10 ** (-decades * torch.rand(500, 6, dtype=torch.float64))
    t = 0.7 * d.square().mean(1).sqrt().median().item()
    metric = Metric(t / math.sqrt(6), None, 1.0, 0.0)
    shrunk = proximal.shrink_groups(z, 1.0, metric, d.square())
    expected = group_reference(z, t, d)
    assert torch.equal((shrunk == 0).all(1), (expected == 0).all(1))
    assert (expected == 0).all(1).any()
    assert torch.allclose(shrunk, expected, rtol=1e-5, atol=1e-9)


def test_group_step_with_elements_that_never_had_a_gradient() -> None:
    z = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    moment = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    shrunk = proximal.shrink_groups(z, 1.0, Metric(0.1, None, 1.0, 1e-8), moment)
    assert torch.allclose(shrunk[0], z[0])  # left alone
    assert shrunk[1, 1] == pytest.approx(4.0)
    assert 0 < shrunk[1, 0] < 3
    assert torch.equal(shrunk[2:], torch.zeros(2, 2))


def test_a_nan_shows_and_stays_where_it_is() -> None:
    w = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    for term in (L1(0.1), GroupLasso(0.1)):
        for moments in (None, [torch.ones(2, 2)]):
            v = w.clone()
            term.shrink_([v], Metric(1.0, moments, 1.0, 1e-8))
            assert v[0].isnan().any()
            assert not v[1].isnan().any()


def test_group_lasso_zeroes_whole_heads() -> None:
    torch.manual_seed(0)
    attention = nn.Linear(12, 12, bias=False)  # 4 heads of 3 units each
    rw.regularize(attention, GroupLasso(0.02, size=3))
    optimizer = SGD(attention.parameters(), lr=0.1)
    rw.attach(attention, optimizer)
    x = torch.randn(256, 12)
    target = torch.zeros(256, 12)
    target[:, 3:6] = x[:, :3] * 2  # one head has something to do
    for _ in range(500):
        optimizer.zero_grad()
        ((attention(x) - target).square().mean() + rw.reg_loss(attention)).backward()
        optimizer.step()
    heads = attention.weight.view(4, -1).abs().amax(1)
    assert (heads == 0).tolist() == [True, False, True, True]


def test_l1_beside_group_lasso_is_the_sparse_group_lasso() -> None:
    w = torch.randn(6, 4, dtype=torch.float64)
    model = nn.Linear(4, 6, bias=False).double()
    model.weight.data.copy_(w)
    rw.regularize(model, GroupLasso(0.2) + L1(0.3))
    optimizer = SGD(model.parameters(), lr=1.0)
    rw.attach(model, optimizer)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    z = soft(w, 0.3)
    factor = (1 - 0.4 / z.norm(dim=1, keepdim=True)).clamp_min(0)
    assert torch.allclose(model.weight, z * factor)


# ---- what is read at every step ----------------------------------------------------------------


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step against zero gradients, so that only the penalty moves weights."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_learning_rates_are_read_at_every_step_group_by_group() -> None:
    model = rw.regularize(net(), L1(1.0))
    groups = [{"params": model.a.parameters(), "lr": 0.01}, {"params": model.b.parameters()}]
    optimizer = SGD(groups, lr=0.02)
    rw.attach(model, optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for rate in (0.01, 0.005):
        a, b = model.a.weight.clone(), model.b.weight.clone()
        one_step(model, optimizer)
        schedule.step()
        assert torch.allclose(model.a.weight, soft(a, rate).float(), atol=1e-7)
        assert torch.allclose(model.b.weight, soft(b, 2 * rate).float(), atol=1e-7)


def test_a_learning_rate_may_be_a_tensor() -> None:
    model = rw.regularize(net(), L1(1.0))
    optimizer = SGD(model.parameters(), lr=torch.tensor(0.01))
    rw.attach(model, optimizer)
    before = model.a.weight.clone()
    one_step(model, optimizer)
    assert torch.allclose(model.a.weight, soft(before, 0.01).float(), atol=1e-7)


def test_a_later_rule_changes_what_is_attached() -> None:
    model = rw.regularize(net(), L1(1.0) + L2(0.1))
    optimizer = SGD(model.parameters(), lr=0.01)
    rw.attach(model, optimizer)
    one_step(model, optimizer)
    rw.regularize(model, {"a": L1(2.0), "b": None})
    a, b = model.a.weight.clone(), model.b.weight.clone()
    one_step(model, optimizer)
    assert torch.allclose(model.a.weight, soft(a - 0.01 * 0.1 * a, 0.02).float(), atol=1e-7)
    assert torch.equal(model.b.weight, b)
    assert rw.reg_loss(model) == 0


def test_unregularize_ends_what_is_attached() -> None:
    model = rw.regularize(net(), L1(1.0) + L2(0.1))
    optimizer = SGD(model.parameters(), lr=0.01)
    attachment = rw.attach(model, optimizer)
    rw.unregularize(model)
    before = copy.deepcopy(model)
    one_step(model, optimizer)
    assert same_bits(model, before)
    assert attachment.finalize(10) == {}
    assert same_bits(model, before)
    attachment.remove()
    assert "_regwrap" not in model.a.__dict__


def test_regularized_again_the_penalties_are_in_the_loss_and_not_in_the_step_too() -> None:
    model = rw.regularize(net(), L1(1.0) + L2(0.1))
    first = SGD(model.parameters(), lr=0.01)
    left_behind = rw.attach(model, first)
    rw.unregularize(model)
    rw.regularize(model, L1(1.0) + L2(0.1))
    before = copy.deepcopy(model)
    one_step(model, first)
    assert same_bits(model, before)
    assert rw.reg_loss(model) > 0
    assert repr(left_behind) == "Attachment(SGD: nothing)"

    second = SGD(model.parameters(), lr=0.01)
    rw.attach(model, second)
    one_step(model, first)
    assert same_bits(model, before)
    left_behind.remove()
    assert rw.reg_loss(model) == 0
    one_step(model, second)
    assert not same_bits(model, before)


def test_a_penalty_that_is_cleared_and_comes_back_is_carried_again() -> None:
    model = rw.regularize(net(), L1(1.0))
    optimizer = SGD(model.parameters(), lr=0.01)
    attachment = rw.attach(model, optimizer)
    rw.regularize(model, {"": None})
    before = copy.deepcopy(model)
    one_step(model, optimizer)
    assert same_bits(model, before)
    assert attachment.finalize(10) == {}
    rw.regularize(model, L1(1.0))
    assert rw.reg_loss(model) == 0
    one_step(model, optimizer)
    assert not same_bits(model, before)


def test_groups_added_and_states_loaded_later() -> None:
    model = rw.regularize(net(), L1(1.0))
    model.b.requires_grad_(False)
    optimizer = SGD(model.a.parameters(), lr=0.01)
    rw.attach(model, optimizer)  # b is frozen, and none of the optimizer's
    optimizer.add_param_group({"params": [model.norm.weight], "lr": 0.5})
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.02
    before = model.a.weight.clone()
    one_step(model, optimizer)
    assert torch.allclose(model.a.weight, soft(before, 0.02).float(), atol=1e-7)
    model.b.requires_grad_(True)
    assert rw.reg_loss(model) == model.b.weight.abs().sum()


def test_a_parameter_that_the_optimizer_lost_is_said_before_the_step() -> None:
    model = rw.regularize(net(), L1(1.0))
    optimizer = SGD(model.parameters(), lr=0.01)
    rw.attach(model, optimizer)
    model.a.weight = nn.Parameter(model.a.weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(optimizer.param_groups[0]["params"])
    message = r"SGD\.step\(\): L1\(1\.0\) on 'a\.weight' is attached, and the optimizer no longer"
    with pytest.raises(rw.PolicyError, match=message):
        one_step(model, optimizer)


# ---- traps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), lambda p: Adam(p, lr=0.1)])
def test_a_parameter_without_gradient_is_left_alone(make: Make) -> None:
    rules = L1(0.1) + L2(0.1) + WeightDecay(0.1) + GroupLasso(0.1) + MaxNorm(0.1)
    model = rw.regularize(net(), rules)
    optimizer = make(model.parameters())
    rw.attach(model, optimizer)
    before = model.a.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        model.b(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    assert torch.equal(model.a.weight, before)
    assert model.a.weight.grad is None


def test_unseen_embedding_rows_are_left_alone_under_adam() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(10, 4)
    rw.regularize(embedding, L1(0.1))
    optimizer = Adam(embedding.parameters(), lr=0.01)
    rw.attach(embedding, optimizer)
    before = embedding.weight.clone()
    for _ in range(30):
        optimizer.zero_grad()
        (embedding(torch.tensor([1, 2])) - 1).square().sum().backward()
        optimizer.step()
    unseen = [0, 3, 4, 5, 6, 7, 8, 9]
    assert torch.equal(embedding.weight[unseen], before[unseen])
    assert not torch.equal(embedding.weight[1:3], before[1:3])


def test_accumulation_pays_once_a_step() -> None:
    def run(parts: int) -> nn.Module:
        model = rw.regularize(net(), L1(0.01) + L2(0.1))
        optimizer = SGD(model.parameters(), lr=0.1)
        rw.attach(model, optimizer)
        for i in range(5):
            x, y = data(i)
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                ((model(xs) - ys).square().mean() / parts + rw.reg_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    assert gap(run(1), run(4)) <= 1e-6


def test_clipping_sees_the_data_gradient_alone() -> None:
    model = rw.regularize(net(), L2(100.0, on="all"))
    optimizer = SGD(model.parameters(), lr=1e-3)
    rw.attach(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    data_loss(model, 0).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    for p, w, g in zip(model.parameters(), before, grads, strict=True):
        assert torch.allclose(p, w - 1e-3 * (g * 0.1 / norm + 100 * w), atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
def test_grad_scaler(cls: Any, fused: bool) -> None:
    """A fused optimizer still sees gradients that are scaled, and skips an overflow by itself."""
    rules = L2(0.1) + L1(0.01) + L2SP(0.05) + WeightDecay(0.01)

    def run(scaling: bool) -> nn.Module:
        model = rw.regularize(net(), rules)
        optimizer = cls(model.parameters(), lr=0.01, fused=fused, weight_decay=0)
        rw.attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaling)
        for i in range(10):
            optimizer.zero_grad()
            scaler.scale(data_loss(model, i)).backward()
            if i == 5:
                before = copy.deepcopy(model)
                if not scaling:
                    continue
                model.a.weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            if i == 5:
                assert same_bits(model, before)
        return model

    assert gap(run(True), run(False)) <= 1e-5


class Twice(SGD):
    """Calls its base's step, whose hooks run inside its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("hooked_before", [False, True])
def test_a_step_that_calls_super_pays_once(hooked_before: bool) -> None:
    if hooked_before:
        SGD(net().parameters(), lr=0.1)  # torch wraps SGD.step when the first one is made
    ours = attached(L2(0.1) + L1(0.01), lambda p: Twice(p, lr=0.1, momentum=0.9))
    assert same_bits(ours, attached(L2(0.1) + L1(0.01), lambda p: SGD(p, lr=0.1, momentum=0.9)))


class Flaky(SGD):
    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise RuntimeError("no step")
        return super().step(closure)


def test_a_step_that_raised_leaves_nothing_behind() -> None:
    model = rw.regularize(net(), L2(0.1) + L1(0.01))
    optimizer = Flaky(model.parameters(), lr=0.1)
    rw.attach(model, optimizer)
    before = model.a.weight.clone()
    data_loss(model, 0).backward()
    grad = model.a.weight.grad.clone()
    optimizer.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no step"):
            optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert torch.equal(model.a.weight.grad, grad)
    expected = soft(before - 0.1 * (grad + 0.1 * before), 0.1 * 0.01)
    assert torch.allclose(model.a.weight.double(), expected, atol=1e-7)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_after_a_step_that_raised_new_gradients_stand(set_to_none: bool) -> None:
    def trained(model: nn.Module, optimizer: Flaky) -> nn.Module:
        for i in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            data_loss(model, i).backward()
            optimizer.fails = i == 1
            with contextlib.suppress(RuntimeError):
                optimizer.step()
        return model

    ours = rw.regularize(net(), L2(0.1, on="all"))
    optimizer = Flaky(ours.parameters(), lr=0.1)
    rw.attach(ours, optimizer)
    plain = net()
    trained(plain, Flaky(plain.parameters(), lr=0.1, weight_decay=0.1))
    assert same_bits(trained(ours, optimizer), plain)


@pytest.mark.parametrize("keyword", [False, True])
def test_closures_are_wrapped(keyword: bool) -> None:
    """Lightning's automatic optimization computes the gradient inside the step."""
    model = rw.regularize(net(), L2(0.1) + L1(0.01))
    optimizer = SGD(model.parameters(), lr=0.1)
    rw.attach(model, optimizer)
    for i in range(20):

        def closure(i: int = i) -> Tensor:
            optimizer.zero_grad()
            loss = data_loss(model, i)
            loss.backward()
            return loss

        returned = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert returned.ndim == 0
    assert same_bits(model, attached(L2(0.1) + L1(0.01), lambda p: SGD(p, lr=0.1)))


def test_a_compiled_step_does_the_same() -> None:
    model = rw.regularize(net(), L2(0.1) + L1(0.01))
    optimizer = SGD(model.parameters(), lr=0.1)
    rw.attach(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo says that it does not trace sys._getframe
        compiled = torch.compile(lambda: optimizer.step(), backend="eager")
        for i in range(3):
            optimizer.zero_grad()
            data_loss(model, i).backward()
            compiled()
    torch.compiler.reset()
    assert gap(model, attached(L2(0.1) + L1(0.01), lambda p: SGD(p, lr=0.1), 3)) <= 1e-7


def test_tied_weights_pay_once() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(5, 4), "h": nn.Linear(4, 5, bias=False)})
    model["h"].weight = model["e"].weight
    rw.regularize(model, L1(1.0))
    optimizer = SGD(model.parameters(), lr=0.01)
    attachment = rw.attach(model, optimizer)
    before = model["e"].weight.clone()
    one_step(model, optimizer)
    assert torch.allclose(model["e"].weight, soft(before, 0.01).float(), atol=1e-7)
    assert rw.reg_loss(model) == 0
    assert list(attachment.finalize()) == ["e.weight"] == list(rw.sparsity(model))


def test_a_tied_weight_attached_by_a_part_is_in_no_loss() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    for part in ("embed", "head"):
        model = rw.regularize(Tied(), L2(0.1))
        rw.attach(model.get_submodule(part), SGD(model.parameters(), lr=0.1))
        assert rw.reg_loss(model) == 0
        assert rw.penalties(model) == {}
        assert list(rw.penalties(model, attached=True)) == ["embed.weight"]


def test_tied_by_hand_after_regularize_the_later_rule_holds() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(5, 4), "h": nn.Linear(4, 5, bias=False)})
    rw.regularize(model, {"e": L1(1.0), "h": L1(3.0)})
    model["h"].weight = model["e"].weight
    optimizer = SGD(model.parameters(), lr=0.01)
    rw.attach(model, optimizer)
    before = model["e"].weight.clone()
    one_step(model, optimizer)
    assert torch.allclose(model["e"].weight, soft(before, 0.03).float(), atol=1e-7)


# ---- copies, pickles, checkpoints ---------------------------------------------------------------


def copies(model: nn.Module) -> list[nn.Module]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]


def test_the_copy_of_a_model_has_its_penalties_back() -> None:
    model = rw.regularize(net(), L1(0.1) + L2(0.1) + MaxNorm(5))
    whole = rw.reg_loss(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    model.attachment = rw.attach(model, optimizer)  # as a LightningModule may keep it
    assert rw.reg_loss(model) == 0
    for copied in copies(model):
        assert rw.reg_loss(copied) == whole
        assert {entry.mechanism for entry in rw.policy(copied)} == {"direct", "optimizer"}
        copied.attachment.remove()
        rw.attach(copied, SGD(copied.parameters(), lr=0.1))
        assert rw.reg_loss(copied) == 0
    assert rw.reg_loss(model) == 0


def test_the_copy_of_an_optimizer_carries_nothing() -> None:
    model = rw.regularize(net(), L1(0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    rw.attach(model, optimizer)
    for twin, other in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        assert rw.reg_loss(twin) > 0
        before = copy.deepcopy(twin)
        one_step(twin, other)
        assert same_bits(twin, before)


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Adam(p)])
def test_a_resumed_run_is_bit_equal(make: Make) -> None:
    rules = L1(0.01) + L2(0.1) + L2SP(0.1)

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = rw.regularize(net(), rules)
        optimizer = make(model.parameters())
        rw.attach(model, optimizer)
        return model, optimizer

    model, optimizer = begin()
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 5, start=5)
    resumed, other = begin()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, 5, start=5)
    assert same_bits(resumed, model)


def test_an_optimizer_that_is_gone_carries_nothing() -> None:
    model = rw.regularize(net(), L1(0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    rw.attach(model, optimizer)
    train(model, optimizer, 2)
    assert rw.reg_loss(model) == 0
    del optimizer
    gc.collect()
    assert rw.reg_loss(model) > 0


def test_a_new_optimizer_takes_over_from_one_that_is_gone() -> None:
    model = rw.regularize(net(), L1(0.1))
    for _ in range(3):  # as a notebook's cell that runs again
        optimizer = SGD(model.parameters(), lr=0.1)
        rw.attach(model, optimizer)
        train(model, optimizer, 1)
    assert rw.reg_loss(model) == 0


def test_an_attachment_keeps_its_optimizer() -> None:
    model = rw.regularize(net(), L1(0.1))
    attachment = rw.attach(model, SGD(model.parameters(), lr=0.1))
    gc.collect()
    assert rw.reg_loss(model) == 0
    attachment.remove()
    assert rw.reg_loss(model) > 0
    assert repr(attachment) == "Attachment(removed: nothing)"


# ---- wrappers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared_before", [False, True])
def test_accelerate(prepared_before: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = rw.regularize(net(), L1(0.01) + L2(0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    if not prepared_before:
        rw.attach(model, optimizer)
    prepared, wrapper = accelerator.prepare(model, optimizer)
    if prepared_before:
        rw.attach(prepared, wrapper)
    for i in range(20):
        wrapper.zero_grad()
        accelerator.backward(data_loss(prepared, i) + rw.reg_loss(prepared))
        wrapper.step()
    assert same_bits(model, attached(L1(0.01) + L2(0.1), lambda p: SGD(p, lr=0.1)))


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.filterwarnings("ignore")  # Lightning's own advice on loaders and loggers
def test_lightning(automatic: bool, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic
            self.net = rw.regularize(net(), L1(0.01) + L2(0.1))

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.net.parameters(), lr=0.1)
            if automatic:
                self.attachment = rw.attach(self.net, optimizer)
            return optimizer

        def training_step(self, batch: Tensor, index: int) -> Tensor | None:
            loss = data_loss(self.net, int(batch)) + rw.reg_loss(self.net)
            if automatic:
                return loss
            wrapper = self.optimizers()
            if index == 0:
                self.attachment = rw.attach(self.net, wrapper)
                loss = data_loss(self.net, 0)
            wrapper.zero_grad()
            self.manual_backward(loss)
            wrapper.step()
            return None

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(20), batch_size=1))
    assert same_bits(module.net, attached(L1(0.01) + L2(0.1), lambda p: SGD(p, lr=0.1)))


# ---- refusals: by name, before anything is touched ----------------------------------------------


def refused(model: nn.Module, optimizer: Any, message: str, error: Any = rw.PolicyError) -> None:
    before = [row["mechanism"] for row in rw.policy(model).rows()]
    with pytest.raises(error) as caught:
        rw.attach(model, optimizer)
    assert message in str(caught.value)
    assert [row["mechanism"] for row in rw.policy(model).rows()] == before


def test_lbfgs_is_refused() -> None:
    model = rw.regularize(net(), L1(0.1))
    refused(
        model,
        torch.optim.LBFGS(model.parameters()),
        "attach: LBFGS cannot carry penalties: it searches along lines on which the penalty would "
        "change under it; leave the penalties in the loss.",
    )


def foreign(name: str, module: str) -> type[SGD]:
    return type(name, (SGD,), {"__module__": module})


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        (
            "ZeroRedundancyOptimizer",
            "torch.distributed.optim",
            "ZeroRedundancyOptimizer cannot carry penalties: it steps a part of the parameters on "
            "each rank; use fully_shard with a plain optimizer.",
        ),
        (
            "FusedSGD",
            "apex.optimizers.fused_sgd",
            "FusedSGD cannot carry penalties: it steps copies of the parameters; use torch.optim's "
            "fused=True.",
        ),
        (
            "DeepSpeedCPUAdam",
            "deepspeed.ops.adam",
            "DeepSpeedCPUAdam cannot carry penalties: it steps copies of the parameters; leave the "
            "penalties in the loss.",
        ),
    ],
)
def test_optimizers_of_others_are_refused(name: str, module: str, message: str) -> None:
    model = rw.regularize(net(), L1(0.1))
    refused(model, foreign(name, module)(model.parameters(), lr=0.1), message)


def test_a_differentiable_optimizer_is_refused() -> None:
    model = rw.regularize(net(), L1(0.1))
    optimizer = SGD(model.parameters(), lr=0.1, differentiable=True)
    refused(model, optimizer, "SGD cannot carry penalties: it is differentiable, and a step in")


def test_an_optimizer_without_hooks_or_without_a_rate_is_refused() -> None:
    class Bare(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            self.param_groups = [{"params": list(params)}]

        def step(self, closure: Any = None) -> None: ...

    class Rateless(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": None})

        def step(self, closure: Any = None) -> None: ...

    model = rw.regularize(net(), WeightDecay(0.1))
    refused(model, Bare(model.parameters()), "Bare cannot carry penalties: it has a step without")
    message = "Rateless cannot carry penalties: it has no learning rate to read (lr=None)"
    refused(model, Rateless(model.parameters()), message)


def test_what_is_no_optimizer_is_refused() -> None:
    model = rw.regularize(net(), L1(0.1))
    refused(model, "adam", "attach(model, optimizer) needs a torch.optim.Optimizer", TypeError)


def test_a_parameter_that_the_optimizer_does_not_hold_is_refused() -> None:
    model = rw.regularize(net(), L1(0.1))
    refused(
        model,
        SGD(model.a.parameters(), lr=0.1),
        "attach: L1(0.1) on 'b.weight' is trainable and not among the parameters of SGD: its "
        "penalty would be lost; give the optimizer regwrap.param_groups(model), or attach a "
        "submodule that it holds.",
    )


def test_a_second_attach_is_refused() -> None:
    model = rw.regularize(net(), L1(0.1))
    attachment = rw.attach(model, SGD(model.parameters(), lr=0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(rw.PolicyError, match="is attached to an optimizer already; call remove"):
        rw.attach(model, optimizer)
    attachment.remove()
    rw.attach(model, optimizer)


@pytest.mark.parametrize("rules", [None, {nn.Linear: Dropout(0.5)}, Orthogonal(0.1)])
def test_a_policy_with_nothing_for_an_optimizer_is_refused(rules: Any) -> None:
    model = net() if rules is None else rw.regularize(net(), rules)
    message = "attach: Net has no entry for an optimizer; regularize it first with L1, L2,"
    refused(model, SGD(model.parameters(), lr=0.1), message)


def test_a_parametrized_weight_is_refused() -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model.a)
    rw.regularize(model, L1(0.1))
    message = "L1(0.1) on 'a.weight' acts on a parametrized weight, which no step of SGD can move"
    refused(model, SGD(model.parameters(), lr=0.1), message)


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), lambda p: Adam(p, lr=0.1)])
def test_a_weight_under_dropconnect_is_attached(make: Make) -> None:
    model = rw.regularize(net(), {"a": [DropConnect(0.2), L1(0.5), L2(0.1), MaxNorm(1.0)]})
    optimizer = make(model.parameters())
    attachment = rw.attach(model, optimizer)
    assert rw.reg_loss(model) == 0
    train(model, optimizer, 30)
    zeros = attachment.finalize()
    assert list(zeros) == list(rw.penalties(model, attached=True)) == ["a.weight"]
    assert zeros["a.weight"] > 24
    rw.unregularize(model)
    assert (model.a.weight == 0).sum() == zeros["a.weight"]


def test_a_lazy_weight_is_refused() -> None:
    model = rw.regularize(nn.LazyLinear(3), L1(0.1))
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    refused(model, optimizer, "is lazy still; run a forward first, then make SGD and attach.")


def test_a_complex_weight_is_refused_where_it_has_no_proximal_step() -> None:
    model = rw.regularize(nn.Linear(2, 2, dtype=torch.complex64), L1(0.1))
    refused(model, SGD(model.parameters(), lr=0.1), "is complex: SGD moves its real and imaginary")
    rw.regularize(model, None_and(L2(0.1)))
    optimizer = SGD(model.parameters(), lr=0.1)
    rw.attach(model, optimizer)
    before = model.weight.clone()
    one_step(model, optimizer)
    assert torch.allclose(model.weight, before * (1 - 0.01))


def None_and(term: Any) -> list[Any]:
    return [("", None), ("", term)]


def test_sparse_gradients_are_refused_where_they_would_become_dense() -> None:
    model = rw.regularize(nn.Embedding(5, 2, sparse=True), L2(0.1))
    message = "L2(0.1) on 'weight' would make the sparse gradient of its Embedding dense"
    refused(model, SGD(model.parameters(), lr=0.1), message)


def test_a_sparse_gradient_that_comes_later_is_refused_at_the_step() -> None:
    model = rw.regularize(nn.Embedding(5, 2), L2(0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    rw.attach(model, optimizer)
    model.weight.grad = torch.eye(5, 2).to_sparse()
    with pytest.raises(rw.PolicyError, match="attached to a parameter whose gradient is sparse"):
        optimizer.step()


def test_other_optimizers_get_the_plain_threshold_and_a_warning() -> None:
    model = rw.regularize(net(), L1(1.0))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    message = (
        r"attach: the metric of RMSprop is not known, so that L1 and GroupLasso use the plain "
        r"threshold lr \* strength: weights become exactly zero, but at another strength"
    )
    with pytest.warns(rw.RegwrapWarning, match=message):
        rw.attach(model, optimizer)
    before = model.a.weight.clone()
    one_step(model, optimizer)
    assert torch.allclose(model.a.weight, soft(before, 0.01).float(), atol=1e-7)


# ---- the attachment -----------------------------------------------------------------------------


def test_what_stays_in_the_loss() -> None:
    model = rw.regularize(net(), L1(0.1) + Orthogonal(0.2) + rw.Penalty(torch.sum, 0.3))
    left = rw.reg_loss(rw.regularize(net(), Orthogonal(0.2) + rw.Penalty(torch.sum, 0.3)))
    everything = rw.reg_loss(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    rw.attach(model, optimizer)
    assert rw.reg_loss(model) == left
    assert sum(rw.penalties(model).values()).item() == pytest.approx(left.item())
    listed = rw.penalties(model, attached=True)
    assert sum(listed.values()).item() == pytest.approx(everything.item())


def test_rows_say_what_the_optimizer_carries() -> None:
    model = rw.regularize(net(), L1(0.1) + Orthogonal(0.2))
    attachment = rw.attach(model, SGD(model.parameters(), lr=0.1))
    mechanisms = {r["term"]: r["mechanism"] for r in rw.policy(model).rows() if r["term"]}
    assert mechanisms == {"L1(0.1)": "optimizer", "Orthogonal(0.2)": "direct"}
    assert repr(attachment) == "Attachment(SGD: 2 L1)"
    attachment.remove()
    attachment.remove()
    mechanisms = {r["term"]: r["mechanism"] for r in rw.policy(model).rows() if r["term"]}
    assert set(mechanisms.values()) == {"direct"}


def test_remove_gives_the_penalties_back() -> None:
    model = rw.regularize(net(), L1(0.1) + L2(0.1) + MaxNorm(0.1))
    whole = rw.reg_loss(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    attachment = rw.attach(model, optimizer)
    attachment.remove()
    assert rw.reg_loss(model) == whole
    before = copy.deepcopy(model)
    one_step(model, optimizer)
    assert same_bits(model, before)


def test_finalize_and_sparsity() -> None:
    model = rw.regularize(net(), {"a": L1(0.1), "b": L2(0.1)})
    optimizer = SGD(model.parameters(), lr=0.1)
    attachment = rw.attach(model, optimizer)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight.fill_(1.0)
            layer.weight[0, :3] = torch.tensor([0.0, 1e-7, -1e-3])
    assert rw.sparsity(model) == {"a.weight": 1 / 48, "b.weight": 1 / 24}
    assert attachment.finalize() == {"a.weight": 2}
    assert attachment.finalize(tolerance=1e-2) == {"a.weight": 3}
    assert rw.sparsity(model) == {"a.weight": 3 / 48, "b.weight": 1 / 24}
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="finalize: tolerance must be a finite number >= 0, n"):
            attachment.finalize(bad)
    for worse in ("1e-6", True):
        with pytest.raises(TypeError, match="finalize: tolerance must be a finite number >= 0, no"):
            attachment.finalize(worse)


def test_two_optimizers_for_two_parts() -> None:
    model = rw.regularize(net(), L2(0.1))
    first, second = SGD(model.a.parameters(), lr=0.1), SGD(model.b.parameters(), lr=0.1)
    rw.attach(model.a, first)
    assert rw.reg_loss(model) == rw.reg_loss(model.b) > 0
    rw.attach(model.b, second)
    assert rw.reg_loss(model) == 0
    for i in range(20):
        model.zero_grad()
        data_loss(model, i).backward()
        first.step()
        second.step()
    plain = net()
    plain.norm.requires_grad_(False)
    groups = [
        {"params": [plain.a.weight, plain.b.weight], "weight_decay": 0.1},
        {"params": [plain.a.bias, plain.b.bias]},
    ]
    train(plain, SGD(groups, lr=0.1))
    assert same_bits(model, plain)


def test_frozen_parameters_need_no_optimizer() -> None:
    model = rw.regularize(net(), L1(0.1))
    model.a.requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rw.attach(model, optimizer)
    before = model.a.weight.clone()
    train(model, optimizer, 2)
    assert torch.equal(model.a.weight, before)
