"""What blog posts and answers write by hand, each against the rule that replaces it.

Both models start from the same weights and train in lockstep; penalty, gradients and weights agree
at each of 20 steps. In float64, so that 1e-6 speaks of the formulas and not of rounding (in float32
the sign of a weight near 0, which is L1's gradient, may differ by the order of two additions).
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regwrap as rw
from regwrap import L1, L2, Dropout, ElasticNet, Penalty

LAMBDA = 1e-2


class HiddenPredict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(12, 16)
        self.predict = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(F.relu(self.hidden(x)))


@pytest.fixture
def net() -> HiddenPredict:
    torch.manual_seed(0)
    return HiddenPredict().double()


def assert_equal_training(
    ours: nn.Module,
    theirs: nn.Module,
    penalty: Callable[[nn.Module], Tensor | float],
    *,
    features: int = 12,
    weight_decay: float = 0.0,
) -> None:
    """`ours` with its `reg_loss` trains as `theirs` with the hand-written `penalty`."""
    optimizers = (
        torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay),
    )
    data = torch.Generator().manual_seed(1)

    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    for step in range(20):
        x = torch.randn(8, features, generator=data, dtype=torch.float64)
        y = torch.randint(10, (8,), generator=data)
        losses = []
        for model, term in ((ours, rw.reg_loss), (theirs, penalty)):
            torch.manual_seed(step)  # the same dropout masks
            losses.append((F.cross_entropy(model(x), y), term(model)))
        (our_loss, our_penalty), (their_loss, their_penalty) = losses
        close(our_loss, their_loss)
        if not weight_decay:  # which has no value to compare, only a gradient inside the optimizer
            close(our_penalty, torch.as_tensor(their_penalty, dtype=torch.float64))
        for (loss, term), optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            (loss + term).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(p.grad, q.grad + weight_decay * q.detach())
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(p.detach(), q.detach())


def test_sgd_weight_decay_is_l2_on_all(net):
    ours = rw.regularize(copy.deepcopy(net), L2(LAMBDA, on="all"))
    assert_equal_training(ours, net, lambda m: 0.0, weight_decay=LAMBDA)


def test_norm_and_half_squared_sum_of_four_weights():
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.5, -2.3, 0.7, -0.9]]))
    norm = rw.regularize(copy.deepcopy(layer), Penalty(torch.norm, 1.0, name="norm"))
    assert f"{norm.reg_loss:.4f}" == "2.9732"
    assert f"{rw.regularize(layer, L2(0.01)).reg_loss:.4f}" == "0.0442"


def test_l1_loop_over_all_parameters(net):
    ours = rw.regularize(copy.deepcopy(net), L1(LAMBDA, on="all"))
    assert_equal_training(ours, net, lambda m: LAMBDA * sum(p.abs().sum() for p in m.parameters()))


def test_elastic_net_as_sums_without_a_half(net):
    l1, l2 = 3e-3, 7e-3

    def by_hand(m: nn.Module) -> Tensor:
        return sum(l1 * p.abs().sum() + l2 * p.pow(2).sum() for p in m.parameters())

    terms = L1(l1, on="all") + L2(2 * l2, on="all")
    assert_equal_training(rw.regularize(copy.deepcopy(net), terms), net, by_hand)


def test_elastic_net_in_scikit_learns_terms(net):
    alpha, ratio = 1e-2, 0.3

    def by_hand(m: nn.Module) -> Tensor:
        weights = [m.hidden.weight, m.predict.weight]
        l1, l2 = sum(w.abs().sum() for w in weights), sum(w.square().sum() for w in weights)
        return alpha * ratio * l1 + 0.5 * alpha * (1 - ratio) * l2

    ours = rw.regularize(copy.deepcopy(net), ElasticNet(alpha, ratio))
    assert_equal_training(ours, net, by_hand)


def test_lambda_over_two_n(net):
    lam, n = 5.0, 600
    ours = rw.regularize(copy.deepcopy(net), L2(lam / n, on="all"))
    assert_equal_training(
        ours, net, lambda m: lam / (2 * n) * sum(p.square().sum() for p in m.parameters())
    )


def test_mlp_784_128_10_with_l1_l2_and_dropout():
    torch.manual_seed(0)
    l1, l2 = 1e-4, 1e-3

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(784, 128)
            self.fc2 = nn.Linear(128, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(x)))

    class ByHand(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(F.dropout(self.fc1(x), 0.5, self.training)))

    theirs = ByHand().double()
    ours = Net().double()
    ours.load_state_dict(theirs.state_dict())
    rw.regularize(ours, {"": [L1(l1), L2(l2)], "fc1": Dropout(0.5)})

    def by_hand(m: nn.Module) -> Tensor:
        return sum(
            l1 * w.abs().sum() + l2 / 2 * w.square().sum() for w in (m.fc1.weight, m.fc2.weight)
        )

    assert_equal_training(ours, theirs, by_hand, features=784)


def test_sequential_784_256_128_10_with_dropout_3_and_5():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    ).double()
    first, relu, second, _, head = copy.deepcopy(plain)
    theirs = nn.Sequential(first, nn.Dropout(0.3), relu, second, nn.Dropout(0.5), relu, head)
    ours = rw.regularize(plain, {"0": Dropout(0.3), "2": Dropout(0.5)})
    assert_equal_training(ours, theirs, lambda m: 0.0, features=784)


@pytest.mark.parametrize("order", [1, 2])
def test_loop_of_unsquared_norms(net, order):
    def norm(p: Tensor) -> Tensor:
        return torch.norm(p, order)

    ours = rw.regularize(copy.deepcopy(net), Penalty(norm, LAMBDA, name="norm", on="all"))
    assert_equal_training(ours, net, lambda m: LAMBDA * sum(norm(p) for p in m.parameters()))


def test_biases_are_left_out_by_default(net):
    ours = rw.regularize(copy.deepcopy(net), L2(LAMBDA))
    assert_equal_training(
        ours,
        net,
        lambda m: LAMBDA / 2 * (m.hidden.weight.square().sum() + m.predict.weight.square().sum()),
    )


def test_hidden_alone_with_its_bias_in_a_loop_without_the_half(net):
    ours = rw.regularize(copy.deepcopy(net), {"hidden": L2(2 * LAMBDA, on="all")})
    assert_equal_training(
        ours, net, lambda m: LAMBDA * sum(p.pow(2).sum() for p in m.hidden.parameters())
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_preserves_the_expectation(p):
    layer = nn.Linear(4, 200_000)
    nn.init.zeros_(layer.weight)
    nn.init.ones_(layer.bias)
    rw.regularize(layer, {"": Dropout(p)})
    torch.manual_seed(0)
    out = layer(torch.randn(4))
    kept = out[out != 0]
    assert kept.numel() / out.numel() == pytest.approx(1 - p, abs=0.005)
    assert torch.equal(kept, torch.full_like(kept, 1 / (1 - p)))
    assert out.mean().item() == pytest.approx(1, abs=0.05)


def test_dropout_masks_equal_a_hand_edited_twins(net):
    class ByHand(HiddenPredict):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.4)

        def forward(self, x: Tensor) -> Tensor:
            return self.predict(F.relu(self.drop(self.hidden(x))))

    twin = ByHand().double()
    twin.load_state_dict(net.state_dict())
    rw.regularize(net, {"hidden": Dropout(0.4)})
    x = torch.randn(64, 12, dtype=torch.float64)
    for seed in range(5):
        torch.manual_seed(seed)
        ours = net(x)
        torch.manual_seed(seed)
        assert torch.equal(ours, twin(x))
    assert torch.equal(net.eval()(x), twin.eval()(x))
