"""Recipes: what the papers decay, on models shaped as theirs."""

import pytest
import torch
from torch import nn

import regwrap as rw
from regwrap import L2, L2SP, PolicyError, UnmatchedRule, recipes


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.fc2(self.fc1(self.norm(x)).relu())


class Vit(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(4)))
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        return self.head(self.blocks(x + self.pos_embed)[:, 0])


def decayed(model, rules):
    rw.regularize(model, rules)
    groups = rw.param_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}


def test_bert_finetuning_spares_biases_and_norms():
    rates = decayed(Block(8), recipes.bert_finetuning())
    spared = ("norm.weight", "norm.bias", "fc1.bias", "fc2.bias")
    assert rates == {"fc1.weight": 0.01, "fc2.weight": 0.01} | dict.fromkeys(spared, 0)


def test_vit_spares_positions_and_tokens():
    model = Vit()
    rates = decayed(model, recipes.vit(model))
    assert {name for name, rate in rates.items() if rate} == {
        name for name, p in model.named_parameters() if p.dim() == 2
    }
    assert set(rates.values()) == {0, 0.05}


def test_vit_of_a_model_without_positions():
    model = Block(8)
    assert recipes.vit(model) == [("", rw.WeightDecay(0.05))]


def test_resnet_with_and_without_biases_and_norms():
    def model():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    spared = decayed(model(), recipes.resnet())
    assert [name for name, rate in spared.items() if rate] == ["0.weight"]
    everything = decayed(model(), recipes.resnet(everything=True))
    assert set(everything.values()) == {1e-4}


def test_l2_sp_pulls_to_the_start_and_the_head_to_zero():
    model = rw.regularize(Vit(), recipes.l2_sp("head"))
    terms = {(row["path"], row["term"]) for row in rw.policy(model).rows() if row["term"]}
    assert ("head", repr(L2(0.01))) in terms
    assert ("blocks.0.fc1", repr(L2SP(0.1))) in terms
    assert ("head", repr(L2SP(0.1))) not in terms
    head = 0.01 / 2 * model.head.weight.square().sum()
    assert torch.allclose(model.reg_loss, head, rtol=1e-6)


def test_stochastic_depth_is_a_linear_ramp():
    model = Vit()
    rules = recipes.stochastic_depth(model, "blocks.*.fc2", rate=0.2)
    assert [path for path, _ in rules] == [f"blocks.{i}.fc2" for i in range(4)]
    assert [term.p for _, term in rules] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert all(term.kind is recipes.DropPath for _, term in rules)
    with pytest.raises(UnmatchedRule, match=r"selects no module of Vit; name the Linear layer"):
        recipes.stochastic_depth(model, "layers.*")


def test_stochastic_depth_drops_whole_branches():
    torch.manual_seed(0)
    model = Vit()
    try:
        rw.regularize(model, recipes.stochastic_depth(model, "blocks.*.fc2", rate=0.5))
    except PolicyError as error:
        if "is not built" not in str(error):
            raise
        pytest.skip("Dropout(kind=...) is not built on this branch")
    x = torch.randn(64, 5, 8)
    kept = (model.train().blocks[3](x) != x).flatten(1)
    assert torch.equal(kept.any(1), kept.float().mean(1) > 0.9)  # all or nothing of a sample
    assert 0.3 < kept.any(1).float().mean() < 0.7


def test_drop_path():
    drop = recipes.DropPath(0.25)
    torch.manual_seed(0)
    x = torch.ones(1000, 3)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(y[:, 0], y[:, 1])
    assert abs((y[:, 0] == 0).float().mean() - 0.25) < 0.05
    assert drop.eval()(x) is x
    assert repr(drop) == "DropPath(p=0.25)"
