"""`param_groups`: WeightDecay rules as groups of any optimizer, equal to groups written by hand."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import regwrap as rw
from regwrap import L1, L2, WeightDecay

torch.set_num_threads(1)

OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.Optimizer)
    and "weight_decay" in inspect.signature(cls).parameters
}
LR = {"SGD": 0.05, "Adadelta": 1.0, "Muon": 0.05}


class Net(nn.Module):
    """An embedding, a stack with a norm, and a head that the author marks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4))
        self.mark = nn.Parameter(torch.ones(4, 4))
        self.head = nn.Linear(4, 3)

    def no_weight_decay(self) -> set[str]:
        return {"mark"}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)) @ self.mark)


RULES = {"": WeightDecay(0.1), "body.3": WeightDecay(0.3, on="all"), "embed": None}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def by_hand(model: Net) -> list[dict[str, Any]]:
    body = model.body
    return [
        {"params": [model.mark, body[0].bias, *body[2].parameters(), model.head.bias],
         "weight_decay": 0.0},
        {"params": [model.embed.weight], "weight_decay": 0.05},
        {"params": [body[0].weight, model.head.weight], "weight_decay": 0.1},
        {"params": [body[3].weight, body[3].bias], "weight_decay": 0.3},
    ]  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(torch.randint(5, (8,))), torch.randint(3, (8,))
        ).backward()
        optimizer.step()


def matrices(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups as Muon takes them."""
    kept = [g | {"params": [p for p in g["params"] if p.dim() == 2]} for g in groups]
    return [g for g in kept if g["params"]]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_twenty_steps_are_bit_equal_to_groups_written_by_hand(name: str) -> None:
    plain, model = net(), rw.regularize(net(), RULES)
    lr = LR.get(name, 0.01)
    groups, hand = rw.param_groups(model, weight_decay=0.05, lr=lr), by_hand(plain)
    assert all(group["lr"] == lr for group in groups)
    if name == "Muon":
        groups, hand = matrices(groups), matrices(hand)
    train(model, OPTIMIZERS[name](groups))
    train(plain, OPTIMIZERS[name](hand, lr=lr))
    moved = 0
    start = net().state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
        moved += not torch.equal(value, start[key])
    assert moved >= 5
    assert len(OPTIMIZERS) >= 10


def test_the_rates_reach_the_optimizer() -> None:
    """The comparison above would hold for groups that ignore every rule, too, if both did."""
    decayed, not_decayed = rw.regularize(net(), RULES), net()
    for model in (decayed, not_decayed):
        train(model, torch.optim.SGD(rw.param_groups(model, lr=0.05)))
    for part in ("body.0.weight", "body.3.weight", "body.3.bias"):
        assert not torch.equal(decayed.get_parameter(part), not_decayed.get_parameter(part))


def names(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[Any, list[str]]]:
    """Every group as its weight decay and the names of its parameters."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [(g.get("weight_decay", "default"), [known[id(p)] for p in g["params"]]) for g in groups]


def test_groups_and_their_order() -> None:
    model = rw.regularize(net(), RULES)
    expected = [
        (0.0, ["mark", "body.0.bias", "body.2.weight", "body.2.bias", "head.bias"]),
        ("default", ["embed.weight"]),
        (0.1, ["body.0.weight", "head.weight"]),
        (0.3, ["body.3.weight", "body.3.bias"]),
    ]
    assert names(model, rw.param_groups(model)) == expected


def test_without_weight_decay_the_optimizers_own_default_holds() -> None:
    groups = rw.param_groups(net())
    assert [sorted(group) for group in groups] == [["params", "weight_decay"], ["params"]]
    adamw = torch.optim.AdamW(groups)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0, 0.01]
    sgd = torch.optim.SGD(rw.param_groups(net()), lr=0.1, weight_decay=0.7)
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.0, 0.7]


def test_rates_that_are_equal_share_a_group() -> None:
    model = rw.regularize(net(), {"body.0": WeightDecay(0), "head": WeightDecay(0.5)})
    rates = [rate for rate, _ in names(model, rw.param_groups(model, weight_decay=0.5))]
    assert sorted(rates) == [0.0, 0.5]
    rates = [rate for rate, _ in names(model, rw.param_groups(model, weight_decay=0))]
    assert sorted(rates) == [0.0, 0.5]


def test_defaults_go_into_every_group() -> None:
    for group in rw.param_groups(net(), weight_decay=0.1, lr=0.5, betas=(0.8, 0.9)):
        assert (group["lr"], group["betas"]) == (0.5, (0.8, 0.9))


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    model["head"].weight = model["embed"].weight
    return model


def frozen() -> nn.Module:
    model = net()
    model.body.requires_grad_(False)
    return rw.regularize(model, {"": WeightDecay(0.1), "head": L2(0.1)})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": net,
    "with a policy": lambda: rw.regularize(net(), RULES),
    "tied": tied,
    "frozen": frozen,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d()),
    "lstm": lambda: nn.LSTM(2, 3, 2),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2),
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2))),
    "pruned": lambda: prune.random_unstructured(nn.Linear(2, 2), "weight", 1),
    "root": lambda: rw.regularize(nn.Linear(2, 2), WeightDecay(0.1)),
    "shared": lambda: nn.ModuleList([nn.Linear(2, 2)] * 3),
    "complex": lambda: nn.Linear(2, 2, dtype=torch.complex64),
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "no parameters": nn.ReLU,
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("weight_decay", [None, 0.5])
def test_every_trainable_parameter_exactly_once(name: str, weight_decay: float | None) -> None:
    model = MODELS[name]()
    groups = rw.param_groups(model, weight_decay=weight_decay)
    held = Counter(id(p) for group in groups for p in group["params"])
    assert held == Counter(id(p) for p in model.parameters() if p.requires_grad)
    place = {id(p): i for i, p in enumerate(model.parameters())}
    for group in groups:
        places = [place[id(p)] for p in group["params"]]
        assert places == sorted(places)
        assert group["params"]
    if groups:
        torch.optim.AdamW(groups)


@pytest.mark.parametrize("where", ["embed", "head", "embed.weight", "head.weight", nn.Linear])
def test_a_tied_weight_takes_the_rule_of_either_name(where: Any) -> None:
    model = rw.regularize(tied(), {where: WeightDecay(0.3)})
    assert names(model, rw.param_groups(model)) == [
        (0.3, ["embed.weight"]),
        (0.0, ["head.bias"]),
    ]


@pytest.mark.parametrize("marked", ["embed.weight", "head.weight"])
def test_a_tied_weight_is_spared_whichever_name_is_marked(marked: str) -> None:
    model = tied()
    model.no_weight_decay = {marked}
    expected = [(0.0, ["embed.weight", "head.bias"])]
    assert names(model, rw.param_groups(model, weight_decay=0.1)) == expected


def test_lazy_parameters_are_told_by_their_names() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    rw.regularize(model, {"0": WeightDecay(0.3)})
    groups = names(model, rw.param_groups(model, weight_decay=0.1))
    assert groups == [(0.3, ["0.weight"]), (0.0, ["0.bias", "1.weight", "1.bias"])]


def test_only_weights_proper_decay() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 4)
    groups = dict(names(model, rw.param_groups(model, weight_decay=0.1)))
    assert groups[0.1] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]
    model = nn.Sequential(nn.LayerNorm((2, 2)), nn.LSTM(2, 3))
    groups = dict(names(model, rw.param_groups(model, weight_decay=0.1)))
    assert groups[0.1] == ["1.weight_ih_l0", "1.weight_hh_l0"]


def test_a_rule_reaches_what_would_be_spared() -> None:
    rules = {"**.bias": WeightDecay(0.2), "mark": WeightDecay(0.3), "body.2.weight": WeightDecay(1)}
    model = rw.regularize(net(), rules)
    groups = dict(names(model, rw.param_groups(model)))
    assert groups[0.3] == ["mark"]
    assert groups[1] == ["body.2.weight"]
    assert groups[0.2] == ["body.0.bias", "body.2.bias", "body.3.bias", "head.bias"]


def test_a_parametrized_weight_decays_by_what_it_is_computed_from() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))
    rw.regularize(model, WeightDecay(0.3))
    originals = [f"0.parametrizations.weight.original{i}" for i in (0, 1)]
    assert names(model, rw.param_groups(model)) == [(0.0, ["0.bias"]), (0.3, originals)]


def test_penalties_stay_in_the_loss() -> None:
    model = rw.regularize(net(), L1(0.1) + L2(0.2) + WeightDecay(0.3))
    value = model.reg_loss.item()
    assert value > 0
    rw.param_groups(model)
    assert model.reg_loss.item() == value
    only = rw.regularize(net(), WeightDecay(0.3))
    assert only.reg_loss == 0
    assert rw.penalties(only) == {}


def test_later_rules_and_none() -> None:
    model = rw.regularize(net(), {"": WeightDecay(0.1), "head": WeightDecay(0.2)})
    rw.regularize(model, {"head": WeightDecay(0.4), "body": None})
    groups = dict(names(model, rw.param_groups(model)))
    assert groups[0.4] == ["head.weight"]
    assert groups[0.1] == ["embed.weight"]
    assert groups["default"] == ["body.0.weight", "body.3.weight"]


def test_a_part_of_a_model_and_a_copy() -> None:
    model = rw.regularize(net(), RULES)
    part = dict(names(model.body, rw.param_groups(model.body)))
    assert part[0.3] == ["3.weight", "3.bias"]
    other = copy.deepcopy(model)
    assert names(other, rw.param_groups(other)) == names(model, rw.param_groups(model))


def test_nothing_of_the_model_changes() -> None:
    from support import differences, fingerprint

    model = rw.regularize(net(), RULES)
    before = fingerprint(model)
    rw.param_groups(model, weight_decay=0.1, lr=1)
    assert not differences(before, fingerprint(model))
