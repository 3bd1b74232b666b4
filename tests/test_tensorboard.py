"""What is written to TensorBoard, read back by its own reader."""

import pytest
import torch
from torch import nn

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)
from torch.utils.tensorboard import SummaryWriter

import regwrap as rw
from regwrap import L1, L2, Dropout
from regwrap.integrations.tensorboard import log_policy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf's own


def model():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 2))
    return rw.regularize(body, {"": L2(0.1), "0": L1(0.01) + Dropout(0.4)})


def test_read_back(tmp_path):
    net = model()
    with SummaryWriter(tmp_path) as writer:
        log_policy(writer, net, 0)
        with torch.no_grad():
            net[0].weight[:2] = 0
        log_policy(writer, net, 5)
    events = EventAccumulator(str(tmp_path)).Reload()

    def values(tag):
        return [(e.step, e.value) for e in events.Scalars(f"regwrap/{tag}")]

    assert set(events.Tags()["scalars"]) == {
        f"regwrap/{tag}"
        for tag in (
            "reg_loss", "penalty/0.weight", "penalty/3.weight", "sparsity/0.weight",
            "sparsity/3.weight", "dropout/2",
        )
    }  # fmt: skip
    assert values("reg_loss")[1] == (5, pytest.approx(net.reg_loss.item()))
    now = rw.penalties(net)
    assert values("penalty/0.weight")[1] == (5, pytest.approx(now["0.weight"].item()))
    assert values("sparsity/0.weight") == [(0, 0.0), (5, 0.25)]
    assert values("sparsity/3.weight") == [(0, 0.0), (5, 0.0)]
    assert values("dropout/2")[0] == (0, pytest.approx(0.4))  # the rule took its rate over
    (first, _) = events.Tensors("regwrap/policy/text_summary")
    text = first.tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in text.splitlines())
    assert "L2(0.1) + L1(0.01)" in text
    assert "Dropout(0.4)" in text


class Lines:
    def __init__(self):
        self.scalars, self.texts = {}, {}

    def add_scalar(self, tag, value, step=None):
        self.scalars[tag] = value

    def add_text(self, tag, text, step=None):
        self.texts[tag] = text


def test_rates_in_attributes_and_what_an_optimizer_carries():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, dropout=0.1)})
    net["off"] = nn.MultiheadAttention(4, 2)
    net["rnn"], net["drop"] = nn.LSTM(4, 4, num_layers=2, dropout=0.3), nn.Dropout(0)
    lines = Lines()
    log_policy(lines, net, 0)
    assert {tag: value for tag, value in lines.scalars.items() if "dropout" in tag} == {
        "regwrap/dropout/attention": 0.1, "regwrap/dropout/rnn": 0.3, "regwrap/dropout/drop": 0.0
    }  # fmt: skip
    rw.regularize(net, {"attention": Dropout(0.4), "rnn.weight_hh_l0": L1(0.1)})
    expected = rw.penalties(net)["rnn.weight_hh_l0"].item()
    rw.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    lines = Lines()
    log_policy(lines, net, 1)
    dropping = {tag for tag in lines.scalars if "dropout/attention" in tag}
    assert dropping == {"regwrap/dropout/attention"}  # not its out_proj, which nobody calls
    assert lines.scalars["regwrap/dropout/attention"] == 0.4
    assert lines.scalars["regwrap/reg_loss"] == 0
    assert lines.scalars["regwrap/penalty/rnn.weight_hh_l0"] == pytest.approx(expected)


def test_a_model_that_is_one_layer(tmp_path):
    lines = Lines()
    log_policy(lines, rw.regularize(nn.Linear(2, 2), L2(1.0)), 3)
    assert set(lines.scalars) == {
        "regwrap/reg_loss", "regwrap/penalty/weight", "regwrap/sparsity/weight"
    }  # fmt: skip
    assert "L2(1.0)" in lines.texts["regwrap/policy"]


def test_nothing_changes():
    net = model()
    random, modes = torch.get_rng_state(), [m.training for m in net.modules()]
    log_policy(SilentWriter(), net, 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == modes


class SilentWriter:
    def add_scalar(self, *args):
        pass

    def add_text(self, *args):
        pass
