"""A model without a policy: the table and the doctor together show the well-known silent bugs."""

import io
import types

import pytest
import torch
from rich.console import Console
from torch import nn

import regwrap as rw


class Block(nn.Module):
    def __init__(self, dim, rate):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.q_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.drop = nn.Dropout(rate)

    def forward(self, x):
        return x + self.drop(self.v_proj(self.q_proj(self.norm(x))))


class Classifier(nn.Module):
    """A head whose dropout comes from another setting than the blocks'."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(8, config.dropout) for _ in range(30))
        self.head_drop = nn.Dropout(config.head_dropout)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.head_drop(x))


class ForgottenCall(Classifier):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def config(**changed):
    return types.SimpleNamespace(**{"dropout": 0.1, "head_dropout": 0.3} | changed)


def xray(model, optimizer=None):
    """The table of a wide terminal, and the doctor's codes."""
    out = io.StringIO()
    rw.summary(model, optimizer=optimizer, console=Console(file=out, width=200))
    return out.getvalue(), [f.code for f in rw.doctor(model, optimizer)]


def row(table, layer):
    (line,) = [line for line in table.splitlines() if line.startswith(f"{layer} ")]
    return " ".join(line.split())


def test_a_healthy_model_is_shown_and_left_in_peace():
    model = Classifier(config())
    table, codes = xray(model, torch.optim.AdamW(rw.param_groups(model, weight_decay=0.05)))
    assert codes == []
    assert (
        row(table, "blocks.{0..29}.drop") == "blocks.{0..29}.drop x30 Dropout Dropout(0.1) its own"
    )
    assert row(table, "head_drop") == "head_drop Dropout Dropout(0.3) its own"
    assert "parametrized: _WeightNorm" in row(table, "head")
    assert row(table, "blocks.{0..29}.v_proj").endswith("weight 0.05, bias 0")
    assert row(table, "blocks.{0..29}.norm").endswith("0")
    assert "no policy: this is what regularizes the model of its own" in table


def test_groups_that_cancel_the_decay():
    """The groups of many fine-tuning scripts: the key is there, the value is not."""
    model = Classifier(config())
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    table, codes = xray(model, torch.optim.AdamW(groups, weight_decay=0.1))
    assert "decay-cancelled" in codes
    assert row(table, "blocks.{0..29}.v_proj").endswith(" 0")


def test_a_decay_on_norms_and_biases():
    model = Classifier(config())
    table, codes = xray(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert codes == ["decay-on-norms"]
    assert row(table, "blocks.{0..29}.norm").endswith(" 0.1")


def test_lora_targets_partly_reached():
    model = Classifier(config())
    for block in list(model.blocks)[:25]:
        block.v_proj.lora_A = nn.Linear(8, 2, bias=False)
    table, codes = xray(model)
    assert codes == ["partial-family"]
    assert "blocks.{0..24}.v_proj.lora_A x25" in table


def test_a_rate_that_nothing_reads():
    model = Classifier(config(classifer_dropout=0.5))  # misspelt, as it happens
    table, codes = xray(model)
    assert codes == ["config-unread"]
    assert "0.5" not in table


def test_a_head_that_never_drops():
    model = ForgottenCall(config())
    table, codes = xray(model)
    assert codes == ["dropout-never-called"]
    off = Classifier(config(head_dropout=0.0))  # or its rate is 0: here the table says it
    table, codes = xray(off)
    assert row(table, "head_drop") == "head_drop Dropout Dropout(0) its own"


def test_parameters_outside_the_optimizer():
    model = Classifier(config())
    table, _ = xray(model, torch.optim.SGD(model.blocks.parameters(), lr=0.1))
    assert row(table, "head").endswith("not in the optimizer")


@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")  # one layer
def test_attributes_of_attention_and_recurrent_layers():
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(8, 2, dropout=0.2), "rnn": nn.LSTM(8, 8, dropout=0.4)}
    )
    table, _ = xray(model)
    assert "dropout=0.2" in row(table, "attention")
    assert "dropout=0.4" in row(table, "rnn")
