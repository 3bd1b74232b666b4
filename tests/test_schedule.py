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
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD, AdamW

import regwrap as rw
import regwrap.surgery
from regwrap import L1, L2, Dropout, ElasticNet, MaxNorm, StrengthScheduler, WeightDecay

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


def test_scheduling_after_something_was_compiled_takes_effect(fresh_dynamo: None) -> None:
    model = rw.regularize(Wide(), {"fc": Dropout(0.4)})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert zeros(model, compiled) == pytest.approx(0.4, abs=0.02)
    StrengthScheduler(model, lambda step: 0)
    assert zeros(model, compiled) == 0


# ---- compiled -----------------------------------------------------------------------------------


def test_no_recompilation_over_fifty_steps(fresh_dynamo: None) -> None:
    model = rw.regularize(net(), {"": L1(1e-3) + L2(1e-2), "0": Dropout(0.5)})
    scheduler = StrengthScheduler(model, lambda step: min(1, step / 50))
    torch.compiler.reset()
    frames = CompileCounter()
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 6)
    for _ in range(50):
        optimizer.zero_grad()
        (compiled(x).square().mean() + model.reg_loss).backward()
        optimizer.step()
        scheduler.step()
    assert frames.frame_count == 1
    assert scheduler.factor() == 1


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
    model = rw.regularize(net(), {"": L1(0.01) + L2(0.1), "0": Dropout(0.5)})
    optimizer = AdamW(model.parameters(), lr=0.01)
    rw.attach(model[2], optimizer)  # half in the step, half in the loss
    return model, optimizer, StrengthScheduler(model, cosine)


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
