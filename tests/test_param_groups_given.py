"""param_groups: every trainable parameter once, with any optimizer, split from a user's groups."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import regwrap as rw
from regwrap import WeightDecay

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(20)) -> None:
    for i in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def by_hand(model: Net) -> list[dict[str, Any]]:
    return [
        {"params": [model.a.weight], "weight_decay": 0.3},
        {"params": [model.a.bias, model.norm.weight, model.norm.bias, model.b.bias]},
        {"params": [model.b.weight], "weight_decay": 0.1},
    ]


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda g: SGD(g, lr=0.1, momentum=0.9),
    lambda g: SGD(g, lr=0.1, foreach=True),
    lambda g: SGD(g, lr=0.1, fused=True),
    lambda g: Adam(g, lr=0.01, fused=True),
    lambda g: AdamW(g, lr=0.01, weight_decay=0, foreach=True),
    lambda g: AdamW(g, lr=0.01, weight_decay=0, fused=True),
    lambda g: AdamW(g, lr=torch.tensor(0.01), weight_decay=0),
    lambda g: torch.optim.Adagrad(g, lr=0.1),
    lambda g: torch.optim.RMSprop(g, lr=0.01),
    lambda g: torch.optim.NAdam(g, lr=0.01, decoupled_weight_decay=True),
    lambda g: torch.optim.RAdam(g, lr=0.01),
    lambda g: torch.optim.Adamax(g, lr=0.01),
    lambda g: torch.optim.Adadelta(g),
    lambda g: torch.optim.ASGD(g, lr=0.01),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_any_optimizer_is_bit_equal_to_groups_by_hand(make: Any) -> None:
    ours, plain = rw.regularize(net(), {"a": WeightDecay(0.3)}), net()
    train(ours, make(rw.param_groups(ours, weight_decay=0.1)))
    train(plain, make(by_hand(plain)))
    assert same_bits(ours, plain)


def test_a_capturable_optimizer_takes_the_groups() -> None:
    groups = rw.param_groups(net(), weight_decay=0.1, capturable=True)
    optimizer = Adam(groups, lr=0.01)  # steps on an accelerator only
    assert all(group["capturable"] for group in optimizer.param_groups)


def test_a_resumed_run_is_bit_equal() -> None:
    def begin() -> tuple[Net, AdamW]:
        model = rw.regularize(net(), {"a": WeightDecay(0.3)})
        return model, AdamW(rw.param_groups(model, weight_decay=0.1), lr=0.01)

    model, optimizer = begin()
    train(model, optimizer, range(5))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(5, 10))
    resumed, other = begin()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, range(5, 10))
    assert same_bits(resumed, model)


# ---- groups= ------------------------------------------------------------------------------------


def told(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [{**g, "params": [names[id(p)] for p in g["params"]]} for g in groups]


def test_layer_wise_learning_rates_are_split_by_decay_and_keep_their_keys() -> None:
    model = rw.regularize(net(), {"a": WeightDecay(0.3)})
    groups = [
        {"params": model.a.parameters(), "lr": 0.01, "name": "early"},
        {"params": [*model.norm.parameters(), *model.b.parameters()], "lr": 0.1},
    ]
    made = rw.param_groups(model, weight_decay=0.1, groups=groups, betas=(0.9, 0.98), lr=1.0)
    usual = {"betas": (0.9, 0.98)}
    assert told(model, made) == [
        {"params": ["a.weight"], "lr": 0.01, "name": "early", **usual, "weight_decay": 0.3},
        {"params": ["a.bias"], "lr": 0.01, "name": "early", **usual, "weight_decay": 0.0},
        {
            "params": ["norm.weight", "norm.bias", "b.bias"],
            "lr": 0.1,
            **usual,
            "weight_decay": 0.0,
        },
        {"params": ["b.weight"], "lr": 0.1, **usual, "weight_decay": 0.1},
    ]
    AdamW(made)


def test_a_groups_own_decay_stands_for_its_weights() -> None:
    model = net()
    groups = [
        {"params": model.a.parameters(), "weight_decay": 0.5},
        {"params": model.b.parameters()},
    ]
    assert told(model, rw.param_groups(model, groups=groups)) == [
        {"params": ["a.weight"], "weight_decay": 0.5},
        {"params": ["a.bias"], "weight_decay": 0.0},
        {"params": ["b.weight"]},
        {"params": ["b.bias"], "weight_decay": 0.0},
    ]


def test_two_optimizers_for_two_parts() -> None:
    model = rw.regularize(net(), {"a": WeightDecay(0.3)})
    first = SGD(rw.param_groups(model, groups=[{"params": model.a.parameters()}]), lr=0.1)
    rest = [{"params": [*model.b.parameters(), *model.norm.parameters()]}]
    second = Adam(rw.param_groups(model, groups=rest), lr=0.1)
    held = [p for o in (first, second) for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    rw.attach(model.a, first)  # carried by the group: nothing to do, and fine


def test_the_order_is_the_models_whatever_a_groups_is() -> None:
    model = net()
    backwards = [{"params": list(reversed(list(model.parameters())))}]
    assert told(model, rw.param_groups(model, groups=backwards)) == told(
        model, rw.param_groups(model)
    )


def test_named_parameters_stay_named() -> None:
    model = rw.regularize(net(), {"a": WeightDecay(0.3)})
    made = rw.param_groups(model, groups=[{"params": model.named_parameters()}])
    optimizer = SGD(made, lr=0.1)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["a.weight"], ["a.bias", "norm.weight", "norm.bias", "b.bias"], ["b.weight"]]


def test_frozen_parameters_and_one_bare_tensor() -> None:
    model = net()
    model.a.requires_grad_(False)
    groups = [{"params": model.a.weight}, {"params": model.b.weight}]
    assert told(model, rw.param_groups(model, groups=groups)) == [{"params": ["b.weight"]}]


def test_the_users_groups_are_not_written_to() -> None:
    model = net()
    groups = [{"params": list(model.parameters()), "weight_decay": 0.5}]
    before = [{**g, "params": list(g["params"])} for g in groups]
    rw.param_groups(model, groups=groups)[0]["lr"] = 1
    assert [g.keys() for g in groups] == [g.keys() for g in before]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (
            lambda m: [{"params": m.parameters()}, {"params": [m.b.weight]}],
            ValueError,
            r"param_groups: group 1 has a parameter of shape \(3, 8\) that is in group 0 already; "
            r"leave it in one of them\.",
        ),
        (
            lambda m: [{"params": net().parameters()}],
            ValueError,
            r"param_groups: group 0 has a parameter of shape \(8, 6\) that is not among those of "
            r"Net; give the model that holds it\.",
        ),
        (
            lambda m: list(m.parameters()),
            TypeError,
            r"param_groups: group 0 must be a dict with 'params', as torch\.optim takes it, not",
        ),
        (
            lambda m: {"params": list(m.parameters())},
            TypeError,
            r"param_groups: groups must be a list of dicts, not",
        ),
        (
            lambda m: [{"params": ["a"]}],
            TypeError,
            r"param_groups: group 0 must have parameters or \(name, parameter\) pairs in 'params', "
            r"not 'a'\.",
        ),
        (
            lambda m: [{"params": [m.a.weight]}, {"params": [m.b.weight], "weight_decay": -1}],
            ValueError,
            r"param_groups: group 1: weight_decay must be a finite number >= 0, not -1\.",
        ),
    ],
)
def test_bad_groups(groups: Any, error: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(error, match=message):
        rw.param_groups(model, groups=groups(model))


def test_bad_arguments() -> None:
    """torch.optim checks its own weight_decay, and not those of groups."""
    model = net()
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="param_groups: weight_decay must be a finite number"):
            rw.param_groups(model, weight_decay=bad)
    for worse in ("0.1", True):
        with pytest.raises(TypeError, match="param_groups: weight_decay must be a finite number"):
            rw.param_groups(model, weight_decay=worse)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"params are the model's own; write groups=\[\{'params'"):
        rw.param_groups(model, params=[model.a.weight])
