"""`verify`: every guarantee holds on models that keep it, and each check can fail."""

from __future__ import annotations

import io
import pickle
import random
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from support import differences, fingerprint
from torch import Tensor, nn

import regwrap as rw
from regwrap import L1, L2, DropConnect, Dropout, Penalty, Report, regularize, verify

torch.set_num_threads(1)

NAMES = [
    "eval is untouched",
    "training at rate 0 is untouched",
    "dropout acts",
    "the checkpoint is untouched",
    "undo leaves no trace",
    "pickling keeps the policy",
    "reg_loss is the formula",
]


class Net(nn.Module):
    """A rewritten owner, a hook, a dropout of its own, and one at random."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.b(torch.tanh(self.a(x))))


class Keywords(Net):
    """A dict, an integer tensor and a number in; a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 8)

    def forward(self, batch: dict[str, Tensor], *, scale: float = 1.0) -> Any:
        h = self.a(self.emb(batch["ids"]) + batch["x"] * scale)
        return Output(self.b(torch.tanh(h)), {"hidden": h})


@dataclass
class Output:
    logits: Tensor
    extra: dict[str, Tensor]


RULES: dict[Any, Any] = {"": [L2(1e-3), L1(1e-4)], "a": Dropout(0.5), "tail.0": Dropout(0.5)}


def data() -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(3))


def failed(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.ok]


# ---- models that keep the guarantees ---------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.gru(x)[0])


class Residual(nn.Module):
    """A kind of dropout whose rate has a name that nobody knows."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.rate, self.training)


GOOD: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "rules": (Net, RULES),
    "plain": (Net, {}),
    "penalties": (Net, L2(1e-3, on="all")),
    "rate 0": (Net, {"a": Dropout(0)}),
    "own rate": (Net, {nn.Dropout: Dropout(0.2)}),
    "input": (Net, {"b": Dropout(0.3, at="input")}),
    "activation": (Net, {"a": Dropout(0.3, at="activation")}),
    "kind": (Net, {"a": Dropout(0.3, kind=nn.AlphaDropout), "tail.0": Dropout(0.3, kind=Residual)}),
    "kind by fx": (Net, {"a": Dropout(0.3, kind=Residual)}),
    "no effect": (Recurrent, {nn.GRU: Dropout(0.3)}),
    "weights": (Net, {"b": DropConnect(0.3)}),
    "a layer": (lambda: nn.Linear(8, 4), [("", L2(0.1)), ("", Dropout(0.5))]),
    "sequential": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"0": Dropout(0.5)}),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_model_that_keeps_the_guarantees(name: str) -> None:
    build, rules = GOOD[name]
    model = regularize(build(), rules) if rules else build()
    report = verify(model, data())
    assert failed(report) == [], [c.detail for c in report.checks if not c.ok]
    assert report.ok
    assert [check.name for check in report.checks] == NAMES
    assert all(check.detail for check in report.checks)


def test_what_was_compared_is_told() -> None:
    details = {c.name: c.detail for c in verify(regularize(Net(), RULES), data()).checks}
    assert "1 tensors" in details["eval is untouched"]
    assert "8 gradients" in details["training at rate 0 is untouched"]
    assert details["dropout acts"] == "2 of 2 dropouts, each alone at rate 0.5"
    assert details["the checkpoint is untouched"].startswith("11 keys")
    assert "in float64 over 6 terms" in details["reg_loss is the formula"]


def test_keywords_dicts_and_integers() -> None:
    model = regularize(Keywords(), RULES)
    batch = {"ids": torch.arange(5), "x": torch.randn(5, 8)}
    report = verify(model, batch, scale=2.0)
    assert report.ok
    assert "2 tensors" in report.checks[0].detail
    assert not verify(model, batch, no_such_keyword=1).ok


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_its_modes_its_input_and_the_random_state_are_left(
    training: bool, grad: bool
) -> None:
    model = regularize(Net(), RULES).train(training)
    model.b.eval()
    model(data()).sum().backward()
    x, before = data().requires_grad_(), fingerprint(model)
    state, python = torch.get_rng_state(), random.getstate()
    with torch.set_grad_enabled(grad):
        report = verify(model, x)
        assert torch.is_grad_enabled() == grad
    assert report.ok
    assert "8 gradients" in report.checks[1].detail
    assert not differences(before, fingerprint(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert x.grad is None
    assert torch.equal(x, data())


def test_a_report_prints_a_line_a_check() -> None:
    report = verify(regularize(Net(), RULES), data())
    file = io.StringIO()
    Console(file=file, width=200).print(report)
    lines = file.getvalue().splitlines()
    assert len(lines) == len(NAMES) + 1
    assert all(line.startswith("ok") and n in line for n, line in zip(NAMES, lines, strict=False))
    assert lines[-1].strip() == "7 of 7 checks passed"


def test_a_failed_check_is_printed_as_such() -> None:
    file = io.StringIO()
    Console(file=file, width=200).print(verify(regularize(Net(), RULES), torch.zeros(2, 3)))
    assert "FAILED" in file.getvalue()
    assert "RuntimeError" in file.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor, of torch.jit
def test_compiled() -> None:
    report = verify(regularize(Net(), RULES), data(), compiled=True)
    assert [c.name for c in report.checks] == [*NAMES, "torch.compile"]
    assert report.ok


def test_what_somebody_has_compiled_stays_compiled() -> None:
    model = regularize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"0": Dropout(0.5)})
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    other = torch.compile(nn.Linear(8, 8), backend=backend)
    other(data())
    assert verify(model, data()).ok  # a warning would be an error
    other(data())
    assert count == 1


def test_a_wrapped_model() -> None:
    assert verify(torch.compile(regularize(Net(), RULES), backend="eager"), data()).ok


# ---- models that do not ----------------------------------------------------------------------


class Twisted(Net):
    """Behaves otherwise as soon as it has a policy."""

    how = ""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        ruled = any("regwrap" in key for key in vars(self.a))
        if ruled and self.how == ("train" if self.training else "eval"):
            out = out + 1e-3
        if ruled and self.how == "gradient" and self.training:
            out = out.detach() + 0 * self.a.weight.sum()
        if ruled and self.how == "no gradient" and self.training:
            out = out.detach() + 0 * self.b.weight.sum()
        return out


class ExtraKey(Net):
    """Its checkpoint changes with a policy."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        if any("regwrap" in key for key in vars(self.a)):
            state["extra"] = torch.zeros(1)
        return state


def twisted(how: str) -> nn.Module:
    model = Twisted()
    model.how = how
    return regularize(model, {"": L2(1e-3), "tail.0": Dropout(0.5), "a": Dropout(0.3)})


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("eval", "eval is untouched"),
        ("train", "training at rate 0 is untouched"),
        ("gradient", "training at rate 0 is untouched"),
        ("no gradient", "training at rate 0 is untouched"),
    ],
)
def test_outputs_and_gradients_that_change_are_found(how: str, name: str) -> None:
    assert failed(verify(twisted(how), data())) == [name]
    assert verify(twisted(""), data()).ok


def test_a_hook_that_went_is_found_though_the_model_drops_by_itself() -> None:
    model = regularize(Net(), {"tail.0": Dropout(0.5)})
    model.tail[0]._forward_hooks.clear()
    assert failed(verify(model, data())) == ["dropout acts"]


def test_one_of_several_that_went_is_found() -> None:
    model = regularize(Net(), {"a": Dropout(1e-9), "tail.0": Dropout(1e-9)})
    assert verify(model, data()).ok
    model.tail[0]._forward_hooks.clear()
    (check,) = [c for c in verify(model, data()).checks if not c.ok]
    assert check.detail.endswith("rate 0.5; without effect: tail.0")


def test_a_dropout_that_the_input_does_not_reach_is_no_failure() -> None:
    model = regularize(Gated(), {"a": Dropout(0.5), "b": Dropout(0.5)})
    report = verify(model, data())
    assert report.ok
    assert "; not run by this input: b" in report.checks[2].detail


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        return self.b(x) if second else self.a(x)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_scheduled_rates(factor: float) -> None:
    rules = {**RULES, "b": DropConnect(0.3), nn.Dropout: Dropout(0.2)}
    model = regularize(Net(), rules)
    scheduler = rw.StrengthScheduler(model, lambda step: factor)
    report = verify(model, data())
    assert failed(report) == [], [c.detail for c in report.checks if not c.ok]
    assert scheduler.factor() == factor


@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout])
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_scheduled_rates_of_other_kinds(factor: float, kind: type[nn.Module]) -> None:
    rules = {layer: Dropout(0.5, kind=kind) for layer in ("a", "tail.0")}
    model = regularize(Net(), rules)
    rw.StrengthScheduler(model, lambda step: factor)
    report = verify(model, data())
    assert failed(report) == [], [c.detail for c in report.checks if not c.ok]


def test_a_rewrite_that_went_is_found() -> None:
    model = regularize(Net(), {"a": Dropout(0.5)})
    model.forward = lambda x: Net.forward(model, x)  # type: ignore[method-assign]
    assert "dropout acts" in failed(verify(model, data()))


def test_a_checkpoint_that_changes_is_found() -> None:
    model = regularize(ExtraKey(), L2(1e-3))
    assert failed(verify(model, data())) == ["the checkpoint is untouched"]


def test_an_undo_that_leaves_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = regularize(Net(), RULES)
    monkeypatch.setattr("regwrap.surgery.fx.restore", lambda module: None)
    assert "undo leaves no trace" in failed(verify(model, data()))
    report = verify(model, data())
    assert (
        "left: ['regwrap_dropout_a']" in report.checks[NAMES.index("undo leaves no trace")].detail
    )


def test_a_policy_that_is_not_pickled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = regularize(Net(), L2(1e-3))
    forgetful = types.SimpleNamespace(dumps=pickle.dumps, loads=lambda pickled: Net())
    monkeypatch.setattr("regwrap.trust.pickle", forgetful)
    assert failed(verify(model, data())) == ["pickling keeps the policy"]


def test_a_policy_that_cannot_be_pickled_is_found() -> None:
    model = regularize(Net(), Penalty(lambda w: w.sum(), 0.1, name="sum"))
    report = verify(model, data())
    assert failed(report) == ["pickling keeps the policy"]
    assert "cannot be pickled because" in report.checks[5].detail


def test_a_plain_model_that_cannot_be_pickled_is_no_fault_of_ours() -> None:
    model = regularize(Net(), L2(1e-3))
    model.callback = lambda: None  # type: ignore[assignment]
    report = verify(model, data())
    assert report.ok
    assert "cannot be pickled either" in report.checks[5].detail


def test_a_wrong_sum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = regularize(Net(), L2(1e-3))
    right = rw.penalty.reg_loss
    monkeypatch.setattr("regwrap.penalty.reg_loss", lambda m: right(m) * 1.001)
    assert failed(verify(model, data())) == ["reg_loss is the formula"]


@pytest.mark.slow
def test_a_model_that_does_not_compile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch.compile", refuse)
    report = verify(regularize(Net(), L2(1e-3)), data(), compiled=True)
    assert failed(report) == ["torch.compile"]
    assert report.checks[-1].detail == "RuntimeError: no compiler"


def test_an_input_that_the_model_does_not_take_fails_and_does_not_raise() -> None:
    report = verify(regularize(Net(), RULES), torch.zeros(2, 3))
    assert failed(report) == NAMES[:3]
    assert "RuntimeError" in report.checks[0].detail


def test_no_warning_of_ours_is_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify(regularize(Net(), RULES), data()).ok


def test_a_model_whose_penalties_an_optimizer_carries_passes() -> None:
    model = regularize(Net(), RULES)
    attachment = rw.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    assert failed(verify(model, data())) == []
    attachment.remove()
