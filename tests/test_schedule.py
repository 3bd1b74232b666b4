"""Strengths and rates over steps: in the loss, in the step, in dropouts, without recompiling."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import differences, fingerprint
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW

import regwrap as rw
import regwrap.surgery
from regwrap import (
    L1,
    L2,
    L2SP,
    DropConnect,
    Dropout,
    ElasticNet,
    GroupLasso,
    MaxNorm,
    Orthogonal,
    StrengthScheduler,
    WeightDecay,
)

torch.set_num_threads(1)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))


@pytest.fixture
def fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before or after; the warning that a reset brings once has been given."""
    monkeypatch.setattr(regwrap.surgery, "_warned", True)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    while gc.collect():  # dynamo's caches fall in turns, and other tests count live tensors
        pass


def warm_up(step: int) -> float:
    return min(1, step / 4)


def cosine(step: int) -> float:
    return (1 + math.cos(math.pi * step / 1000)) / 2


def test_it_applies_the_first_factor_when_made_and_goes_on_by_steps() -> None:
    model = rw.regularize(net(), L2(0.1))
    whole = rw.reg_loss(model).item()
    scheduler = StrengthScheduler(model, warm_up)
    seen = []
    for _ in range(6):
        seen.append((scheduler.last_step, scheduler.factor(), rw.reg_loss(model).item() / whole))
        scheduler.step()
    assert [s[:2] for s in seen] == [(0, 0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1), (5, 1)]
    assert [s[2] for s in seen] == pytest.approx([s[1] for s in seen], abs=1e-6)


def test_rows_and_penalties_say_it() -> None:
    model = rw.regularize(net(), {"0": L2(0.1), "2": L1(0.1)})
    before = rw.penalties(model)
    scheduler = StrengthScheduler(model, lambda step: 0.5, kinds=(L1,))
    assert [row["note"] for row in rw.policy(model).rows()] == ["", "scheduled: x 0.5 now"]
    now = rw.penalties(model)
    assert now["0.weight"] == before["0.weight"]
    assert now["2.weight"].item() == pytest.approx(before["2.weight"].item() / 2)
    assert rw.reg_loss(model).dtype == torch.float32
    assert scheduler.factor() == 0.5


def test_a_factor_of_one_changes_no_bit() -> None:
    model = rw.regularize(net(), L1(0.1) + L2(0.1))
    before = rw.reg_loss(model)
    StrengthScheduler(model, lambda step: 1)
    assert torch.equal(rw.reg_loss(model), before)


def test_double_precision_is_kept() -> None:
    model = rw.regularize(net().double(), L2(0.1))
    whole = rw.reg_loss(model).item()
    StrengthScheduler(model, lambda step: 0.1)
    assert rw.reg_loss(model).dtype == torch.float64
    assert rw.reg_loss(model).item() == pytest.approx(whole * 0.1, rel=1e-15)


@pytest.mark.parametrize(
    ("where", "kinds", "moved"),
    [
        (None, None, [True] * 4),
        ("0", None, [True, True, False, False]),
        ("2.weight", None, [False, False, True, True]),
        (nn.Linear, (L1,), [True, False, True, False]),
        ("**", L2, [False, True, False, True]),
        ("2", (L1, L2), [False, False, True, True]),
    ],
)
def test_where_and_kinds_choose(where: Any, kinds: Any, moved: list[bool]) -> None:
    model = rw.regularize(net(), L1(0.1) + L2(0.1))
    StrengthScheduler(model, warm_up, where=where, kinds=kinds)
    notes = [row["note"] for row in rw.policy(model).rows()]
    assert notes == ["scheduled: x 0 now" if m else "" for m in moved]


def test_of_two_schedules_the_later_one_holds() -> None:
    model = rw.regularize(net(), L2(0.1))
    first = StrengthScheduler(model, lambda step: 0.5)
    StrengthScheduler(model, lambda step: 0.25, where="0")
    first.step()
    notes = [row["note"] for row in rw.policy(model).rows()]
    assert notes == ["scheduled: x 0.25 now", "scheduled: x 0.5 now"]


# ---- in the step --------------------------------------------------------------------------------


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


@pytest.mark.parametrize("attach_first", [True, False])
def test_attached_penalties_move_too(attach_first: bool) -> None:
    model = rw.regularize(net(), {"0": L1(1.0), "2": L2(1.0)})
    optimizer = SGD(model.parameters(), lr=0.01)
    if attach_first:
        rw.attach(model, optimizer)
    scheduler = StrengthScheduler(model, warm_up)
    if not attach_first:
        rw.attach(model, optimizer)
    for factor in (0, 0.25, 0.5):
        a, b = model[0].weight.clone(), model[2].weight.clone()
        one_step(model, optimizer)
        scheduler.step()
        t = 0.01 * factor
        assert torch.allclose(model[0].weight, a.sign() * (a.abs() - t).clamp_min(0), atol=1e-7)
        assert torch.allclose(model[2].weight, b * (1 - t), atol=1e-7)


def test_decay_moves_where_attach_does_it() -> None:
    model = rw.regularize(net(), WeightDecay(1.0))
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0)
    rw.attach(model, optimizer)
    StrengthScheduler(model, lambda step: 0.5)
    before = model[0].weight.clone()
    one_step(model, optimizer)
    assert torch.allclose(model[0].weight, before * (1 - 0.005))


def test_decay_that_a_group_carries_is_the_optimizers() -> None:
    model = rw.regularize(net(), WeightDecay(1.0))
    message = (
        r"StrengthScheduler: no schedule moves WeightDecay\(1\.0\): the optimizer's group carries "
        r"it; move group\['weight_decay'\], or give the group weight_decay=0 and call "
        r"attach\(model, optimizer\) first\."
    )
    with pytest.raises(rw.PolicyError, match=message):
        StrengthScheduler(model, warm_up)


# ---- dropouts -----------------------------------------------------------------------------------


def zeros(model: nn.Module, draw: Any = None) -> float:
    torch.manual_seed(0)
    x = torch.ones(200, 6)
    return ((model if draw is None else draw)(x) == 0).float().mean().item()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 100)
        nn.init.ones_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_dropout_rates_move() -> None:
    model = rw.regularize(Wide(), {"fc": Dropout(0.4)})
    scheduler = StrengthScheduler(model, warm_up, kinds=Dropout)
    for factor in (0, 0.25, 0.5, 0.75, 1):
        assert zeros(model) == pytest.approx(0.4 * factor, abs=0.02)
        scheduler.step()
    model.eval()
    assert zeros(model) == 0


class Masked(nn.Dropout):
    """Another class, whose rate has the usual name."""


class Foreign(nn.Module):
    """Another class, whose rate has the name of timm's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.drop_prob, self.training)


@pytest.mark.parametrize("kind", [Masked, Foreign])
@pytest.mark.parametrize("mechanism", ["fx", "hook"])
def test_dropouts_of_other_classes_move(mechanism: str, kind: type[nn.Module]) -> None:
    model = Wide() if mechanism == "fx" else nn.Sequential(Wide().fc)
    where = "fc" if mechanism == "fx" else "0"
    rw.regularize(model, {where: Dropout(0.4, kind=kind)})
    assert [entry.mechanism for entry in rw.policy(model)] == [mechanism]
    scheduler = StrengthScheduler(model, warm_up)
    for factor in (0, 0.25, 0.5, 0.75, 1):
        assert zeros(model) == pytest.approx(0.4 * factor, abs=0.02)
        scheduler.step()
    loaded = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert zeros(loaded) == pytest.approx(0.4, abs=0.02)
    model.eval()
    assert zeros(model) == 0
    assert "Scheduled" not in repr(rw.unregularize(model))


def test_an_eager_scheduled_dropout_draws_the_masks_of_dropout() -> None:
    model = rw.regularize(Wide(), {"fc": Dropout(0.4)})
    plain = rw.regularize(Wide(), {"fc": Dropout(0.2)})
    plain.load_state_dict(model.state_dict())
    StrengthScheduler(model, lambda step: 0.5)
    x = torch.ones(50, 6)
    torch.manual_seed(0)
    ours = model(x)
    torch.manual_seed(0)
    assert torch.equal(ours, plain(x))


def test_a_compiled_scheduled_dropout_drops_and_scales(fresh_dynamo: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = rw.regularize(Wide(), {"fc": Dropout(0.4)}).to(dtype)
        scheduler = StrengthScheduler(model, warm_up)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.ones(400, 6, dtype=dtype)
        whole = model.eval()(x).float()
        model.train()
        for factor in (0, 0.25, 0.5, 0.75, 1):
            out = compiled(x)
            assert out.dtype == dtype
            kept = out != 0
            assert 1 - kept.float().mean().item() == pytest.approx(0.4 * factor, abs=0.02)
            scaled = whole[kept] / (1 - 0.4 * factor)
            close = 1e-5 if dtype == torch.float32 else 2e-2
            assert torch.allclose(out[kept].float(), scaled, rtol=close)
            scheduler.step()


class Chain(nn.Module):
    """A body that can be written anew, with a dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 100)
        self.own = nn.Dropout(0.1)
        self.b = nn.Linear(100, 400)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.own(self.a(x)))


class Guarded(Chain):
    """The same, and a body that cannot."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.b(self.own(self.a(x)))


class Halving(nn.Module):
    """A dropout of somebody else's, under a name of its own for the rate."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.drop_prob, self.training)


def mechanisms(model: nn.Module) -> list[Any]:
    return [row["mechanism"] for row in rw.policy(model).rows() if row["term"]]


def share_dropped(model: nn.Module) -> float:
    """Of the output; of what the weight of b is read as, where that is what drops."""
    if "b" in dict(model.named_modules()) and hasattr(model.b, "parametrizations"):
        torch.manual_seed(0)
        return (model.b.weight == 0).float().mean().item()
    return zeros(model)


DROPS: dict[str, tuple[type[Chain], Any, str]] = {
    "in the code": (Chain, {"b": Dropout(0.4)}, "fx"),
    "in the code, of a kind": (Chain, {"b": Dropout(0.4, kind=Halving)}, "fx"),
    "by a hook": (Guarded, {"b": Dropout(0.4)}, "hook"),
    "by a hook, of a kind": (Guarded, {"b": Dropout(0.4, kind=Halving)}, "hook"),
    "of the weight": (Chain, {"b": DropConnect(0.4)}, "parametrization"),
}
every_drop = pytest.mark.parametrize(("make", "rules", "how"), DROPS.values(), ids=list(DROPS))


@every_drop
def test_every_dropout_moves_and_is_saved_with_the_step(make: Any, rules: Any, how: str) -> None:
    model = rw.regularize(make(), {"own": Dropout(0), **rules})
    assert how in mechanisms(model)
    scheduler = StrengthScheduler(model, warm_up, where="b")
    for factor in (0, 0.25, 0.5, 0.75, 1):
        assert share_dropped(model) == pytest.approx(0.4 * factor, abs=0.01)
        scheduler.step()
    scheduler.load_state_dict({"last_step": 2})
    assert share_dropped(model) == pytest.approx(0.2, abs=0.01)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert share_dropped(copied) == pytest.approx(0.2, abs=0.01)
        scheduler.step()
        assert share_dropped(copied) == pytest.approx(0.2, abs=0.01)
        scheduler.load_state_dict({"last_step": 2})
    assert share_dropped(model.eval()) == 0
    assert share_dropped(rw.unregularize(model.train()).eval()) == 0


@every_drop
def test_verify_and_mc_dropout_take_every_scheduled_dropout(
    make: Any, rules: Any, how: str
) -> None:
    model = rw.regularize(make(), {"own": Dropout(0), **rules})
    StrengthScheduler(model, lambda step: 0.5)
    report = rw.verify(model, torch.ones(4, 6))
    assert report.ok, [check for check in report.checks if not check.ok]
    assert rw.mc_predict(model, torch.ones(4, 6), n=3, task="regression").std.mean() > 0


@every_drop
def test_a_later_rule_leaves_every_dropout_scheduled(make: Any, rules: Any, how: str) -> None:
    model = rw.regularize(make(), {"own": Dropout(0), **rules})
    scheduler = StrengthScheduler(model, lambda step: 0.5 + step / 10, where="b")
    rw.regularize(model, {"a": [Dropout(0.1), L2(0.1)]})
    assert share_dropped(model) == pytest.approx(0.2, abs=0.02)
    scheduler.step()
    assert share_dropped(model) == pytest.approx(0.24, abs=0.02)


@pytest.mark.parametrize("make", [Chain, Guarded])
def test_a_later_rate_is_scheduled(make: Any) -> None:
    model = rw.regularize(make(), {"own": Dropout(0), "b": Dropout(0.4)})
    StrengthScheduler(model, lambda step: 0.5, where="b")
    rw.regularize(model, {"b": Dropout(0.2)})
    assert zeros(model) == pytest.approx(0.1, abs=0.01)


@every_drop
def test_a_failure_half_way_leaves_every_dropout_scheduled(
    make: Any, rules: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rw.regularize(make(), {"own": Dropout(0), **rules})
    StrengthScheduler(model, lambda step: 0.5, where="b")

    def fail(root: nn.Module) -> bool:
        raise RuntimeError("half-way")

    monkeypatch.setattr(regwrap.surgery, "expose", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        rw.regularize(model, {"a": [Dropout(0.1), DropConnect(0.2), L2(0.1)]})
    assert share_dropped(model) == pytest.approx(0.2, abs=0.01)


def test_a_models_own_dropout_moves() -> None:
    model = rw.regularize(Chain(), {"own": Dropout(0.4)})
    assert mechanisms(model) == ["direct"]
    scheduler = StrengthScheduler(model, warm_up)
    for factor in (0, 0.25, 0.5):
        assert model.own.p == 0.4 * factor
        scheduler.step()
    rw.unregularize(model)
    assert model.own.p == 0.1


@pytest.mark.parametrize("make", [Chain, Guarded])
def test_a_kind_whose_rate_cannot_be_set_is_refused(make: Any) -> None:
    class Sealed(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.settings = {"rate": rate}

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, self.settings["rate"], self.training)

    model = rw.regularize(make(), {"b": Dropout(0.4, kind=Sealed)})
    with pytest.raises(rw.PolicyError, match="Sealed keeps its rate under no name that is known"):
        StrengthScheduler(model, warm_up)


@pytest.mark.parametrize("term", [L1(0.1, on="output"), L2(0.1, when="called")], ids=repr)
def test_what_hooks_collect_moves(term: Any) -> None:
    model = rw.regularize(Chain(), {"a": term})
    model(torch.ones(4, 6))
    whole = model.reg_loss.item()
    scheduler = StrengthScheduler(model, warm_up)
    for factor in (0, 0.25, 0.5):
        model(torch.ones(4, 6))
        assert model.reg_loss.item() == pytest.approx(whole * factor)
        scheduler.step()


# ---- compiled -----------------------------------------------------------------------------------


COMPILED: dict[str, tuple[type[nn.Module], Any]] = {
    "loss": (Chain, L1(1e-3) + L2(1e-2)),
    "other penalties": (Chain, L2SP(0.1) + GroupLasso(1e-3) + Orthogonal(1e-3)),
    "hadamard": (Chain, {"b": L1(1e-3, solver="hadamard")}),
    "activity": (Chain, {"a": L2(1e-3, on="output"), "b": L1(1e-3, on="output")}),
    "called": (Chain, L2(1e-2, when="called")),
    "step": (Chain, L1(1e-3) + L2(1e-2) + GroupLasso(1e-3) + WeightDecay(0.1)),
    "dropout in the code": (Chain, {"b": Dropout(0.5)}),
    "dropout before": (Guarded, {"b": Dropout(0.5, at="input")}),
    "dropout by a hook": (Guarded, {"b": Dropout(0.5)}),
    "dropout of the weight": (Chain, {"b": DropConnect(0.5)}),
    "all": (Guarded, {"": L1(1e-3), "b": [L2(1e-2, on="output"), Dropout(0.5)]}),
}


@pytest.mark.parametrize(("make", "rules"), COMPILED.values(), ids=list(COMPILED))
def test_no_recompilation_over_fifty_steps(
    make: Any, rules: Any, fresh_dynamo: None, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    model = rw.regularize(make(), rules)
    optimizer = SGD(model.parameters(), lr=0.01)
    if request.node.callspec.id == "step":
        rw.attach(model, optimizer)
    scheduler = StrengthScheduler(model, lambda step: min(1, step / 50))
    torch.compiler.reset()
    counters.clear()
    frames = CompileCounter()
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    x = torch.randn(16, 6)
    for _ in range(50):
        optimizer.zero_grad()
        (compiled(x).square().mean() + model.reg_loss).backward()
        optimizer.step()
        scheduler.step()
    assert frames.frame_count == counters["stats"]["unique_graphs"] == 1
    assert not counters["recompile_limit"] and not counters["graph_break"]
    assert scheduler.factor() == 1


def test_a_models_own_dropout_compiles_anew_at_every_value(fresh_dynamo: None) -> None:
    """The stated limit."""
    model = rw.regularize(Chain(), {"own": Dropout(0.5)})
    scheduler = StrengthScheduler(model, lambda step: step / 10)
    torch.compiler.reset()
    frames = CompileCounter()
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    for _ in range(4):
        compiled(torch.randn(16, 6))
        scheduler.step()
    assert frames.frame_count == 4


@every_drop
def test_scheduling_after_something_was_compiled_takes_effect(
    make: Any, rules: Any, how: str, fresh_dynamo: None
) -> None:
    model = rw.regularize(make(), {"own": Dropout(0), **rules})
    read = (lambda: model.b.weight * 1) if how == "parametrization" else None
    run = torch.compile(read or model, backend="aot_eager", fullgraph=True)

    def share() -> float:
        torch.manual_seed(0)
        out = run() if read else run(torch.ones(200, 6))
        return (out == 0).float().mean().item()

    assert share() == pytest.approx(0.4, abs=0.02)
    scheduler = StrengthScheduler(model, lambda step: 0.5 * step, where="b")
    for factor in (0, 0.5, 1):
        assert share() == pytest.approx(0.4 * factor, abs=0.02)
        scheduler.step()
    StrengthScheduler(model, lambda step: 0, where="b")
    assert share() == 0


def test_a_compiled_mask_of_the_weight_moves(fresh_dynamo: None) -> None:
    model = rw.regularize(Wide(), {"fc": DropConnect(0.4)})
    scheduler = StrengthScheduler(model, warm_up)
    torch.compiler.reset()
    compiled = torch.compile(lambda: model.fc.weight * 1, backend="aot_eager", fullgraph=True)
    for factor in (0, 0.25, 0.5, 0.75, 1):
        read = torch.stack([compiled() for _ in range(20)])
        assert (read == 0).float().mean().item() == pytest.approx(0.4 * factor, abs=0.02)
        kept = read[read != 0]
        assert torch.allclose(kept, torch.tensor(1 / (1 - 0.4 * factor)))
        scheduler.step()


def test_no_recompilation_of_a_compiled_loss(fresh_dynamo: None) -> None:
    """reg_loss inside the compiled function: what was compiled at the first steps serves all."""
    model = rw.regularize(net(), {"": L1(1e-3) + L2(1e-2), "0": Dropout(0.5)})
    scheduler = StrengthScheduler(model, lambda step: min(1, step / 50))
    torch.compiler.reset()
    frames = CompileCounter()
    loss = torch.compile(lambda x: model(x).square().mean() + rw.reg_loss(model), backend=frames)
    x = torch.randn(16, 6)
    counted, totals = [], []
    for _ in range(50):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo's own, where it leaves reg_loss to Python
            loss(x)
        counted.append(frames.frame_count)
        totals.append(rw.reg_loss(model).item())
        scheduler.step()
    assert set(counted[2:]) == {counted[2]}
    assert totals == sorted(totals)
    assert totals[0] == 0 < totals[-1]


# ---- state --------------------------------------------------------------------------------------


def begin() -> tuple[nn.Module, torch.optim.Optimizer, StrengthScheduler]:
    torch.manual_seed(0)
    rules = {
        "": L1(0.01) + L2(0.1),
        "own": Dropout(0.3),
        "a": [L2(0.1, on="output"), DropConnect(0.2)],
        "b": Dropout(0.5),
        "b.weight": GroupLasso(0.01),
    }
    model = rw.regularize(Guarded(), rules)
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0)
    rw.attach(model.b, optimizer)  # half in the step, half in the loss
    return model, optimizer, StrengthScheduler(model, lambda step: cosine(100 * step))


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> None:
    for i in steps:
        torch.manual_seed(i)
        optimizer.zero_grad()
        (model(torch.randn(8, 6)).square().mean() + model.reg_loss).backward()
        optimizer.step()
        scheduler.step()


def test_a_run_resumed_in_the_middle_is_bit_equal() -> None:
    whole = begin()
    train(*whole, range(10))
    half = begin()
    train(*half, range(5))
    states = pickle.loads(pickle.dumps([part.state_dict() for part in half]))
    assert states[2] == {"last_step": 5}
    resumed = begin()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(*resumed, range(5, 10))
    pairs = zip(resumed[0].parameters(), whole[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert resumed[2].factor() == whole[2].factor()


def test_a_copy_goes_on_with_the_factor_of_the_moment() -> None:
    model = rw.regularize(Wide(), {"": L2(0.1), "fc": Dropout(0.4)})
    scheduler = StrengthScheduler(model, lambda step: 0.5 + step / 4)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        now = rw.reg_loss(copied).item()
        assert now == pytest.approx(rw.reg_loss(model).item())
        scheduler.step()
        assert rw.reg_loss(copied).item() == now
        assert zeros(copied) == pytest.approx(0.2, abs=0.02)
        rw.unregularize(copied)
        assert not [k for k in copied.fc.__dict__ if k.startswith("_regwrap")]
        scheduler.load_state_dict({"last_step": 0})
    assert zeros(model) == pytest.approx(0.2, abs=0.02)


def test_a_later_rule_keeps_the_schedule_and_undo_ends_it() -> None:
    model = rw.regularize(net(), L2(0.1))
    scheduler = StrengthScheduler(model, lambda step: 0.5)
    rw.regularize(model, L2(0.4))
    plain = rw.regularize(net(), L2(0.2))
    assert torch.allclose(rw.reg_loss(model), rw.reg_loss(plain))
    rw.unregularize(model)
    scheduler.step()
    assert rw.reg_loss(model) == 0
    rw.regularize(model, L2(0.2))
    assert rw.reg_loss(model) == rw.reg_loss(plain)


# ---- errors -------------------------------------------------------------------------------------


def test_a_rate_outside_zero_one_raises_before_anything_moves() -> None:
    model = rw.regularize(Wide(), {"": L2(0.1), "fc": Dropout(0.4)})
    scheduler = StrengthScheduler(model, lambda step: 1 + step)
    scheduler.step()
    message = (
        r"StrengthScheduler: factor\(2\) = 3 does not fit Dropout\(0\.4\): Dropout: p must be a "
        r"number in \[0, 1\), not 1\.2\d*\. Choose other entries with where= or kinds=, or another"
    )
    with pytest.raises(ValueError, match=message):
        scheduler.step()
    assert (scheduler.last_step, scheduler.factor()) == (1, 2)
    with pytest.raises(ValueError, match=r"factor\(7\) = 8 does not fit"):
        scheduler.load_state_dict({"last_step": 7})
    assert (scheduler.last_step, scheduler.factor()) == (1, 2)


def test_a_negative_strength_raises_and_changes_nothing() -> None:
    model = rw.regularize(net(), L2(0.1))
    with pytest.raises(ValueError, match=r"factor\(0\) = -1 does not fit L2\(0\.1\)"):
        StrengthScheduler(model, lambda step: -1)
    assert rw.policy(model).rows()[0]["note"] == ""


@every_drop
def test_a_rate_outside_zero_one_is_refused_and_leaves_the_model_alone(
    make: Any, rules: Any, how: str
) -> None:
    model = rw.regularize(make(), rules)
    before = fingerprint(model)
    for factor in (3, -1):
        with pytest.raises(ValueError, match=rf"factor\(0\) = {factor} does not fit Drop"):
            StrengthScheduler(model, lambda step, factor=factor: factor)
    assert differences(before, fingerprint(model)) == []
    assert all("scheduled" not in row["note"] for row in rw.policy(model).rows())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("1", TypeError, r"factor\(0\) must be a number, not '1' of type str"),
        (True, TypeError, r"factor\(0\) must be a number, not True of type bool"),
        (math.nan, ValueError, r"factor\(0\) must be finite, not nan"),
        (math.inf, ValueError, r"factor\(0\) must be finite, not inf"),
    ],
)
def test_what_is_no_factor(value: Any, error: type[Exception], message: str) -> None:
    model = rw.regularize(net(), L2(0.1))
    with pytest.raises(error, match=message):
        StrengthScheduler(model, lambda step: value)


def test_bad_arguments() -> None:
    model = rw.regularize(net(), L2(0.1) + MaxNorm(1.0))
    with pytest.raises(TypeError, match="factor must be a callable step -> number, not 0"):
        StrengthScheduler(model, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not ElasticNet; an ElasticNet is an L1 and an L2"):
        StrengthScheduler(model, warm_up, kinds=ElasticNet)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"kinds must be term classes such as \(L1, Dropout\), not"):
        StrengthScheduler(model, warm_up, kinds=(L2(0.1),))  # type: ignore[arg-type]
    message = r"kinds=\(L1\) chooses no entry of Sequential; see regwrap\.policy\(model\)"
    with pytest.raises(rw.UnmatchedRule, match=message):
        StrengthScheduler(model, warm_up, kinds=L1)
    with pytest.raises(rw.UnmatchedRule, match=r"where='1' chooses no entry of Sequential"):
        StrengthScheduler(model, warm_up, where="1")
    with pytest.raises(rw.PolicyError, match=r"no schedule moves MaxNorm\(1\.0\): it has no s"):
        StrengthScheduler(model, warm_up, kinds=MaxNorm)
