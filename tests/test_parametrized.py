"""Penalties on weights that somebody's parametrization computes."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import regwrap as rw
from regwrap import L1, L2, L2SP, GroupLasso, Orthogonal, Penalty


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


class Noisy(nn.Module):
    """Random in training, counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.train_calls = 0

    def forward(self, w: Tensor) -> Tensor:
        self.calls += 1
        self.train_calls += self.training
        return w + torch.randn_like(w) if self.training else w


class LowRank(nn.Module):
    """A LoRA by parametrization, with parameters of its own."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rows, 2))
        self.b = nn.Parameter(torch.randn(2, columns))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.a @ self.b


def _register(make: Callable[[], nn.Module]) -> Callable[[nn.Module], Any]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", make(), unsafe=True)


def _quiet(put: Callable[..., Any], **how: Any) -> Callable[[nn.Module], Any]:
    def quietly(layer: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            put(layer, **how)

    return quietly


MACHINERY: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "symmetric": _register(Symmetric),
    "noisy": _register(Noisy),
    "low_rank": _register(lambda: LowRank(4, 4)),
    "old_weight_norm": _quiet(nn.utils.weight_norm),
    "old_spectral_norm": _quiet(nn.utils.spectral_norm),
    "pruned": _quiet(prune.l1_unstructured, name="weight", amount=0.5),
}
every = pytest.mark.parametrize("put", MACHINERY.values(), ids=list(MACHINERY))


def built(put: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    put(model[0])
    return model


def batch() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@every
def test_the_effective_weight_is_penalised(put: Any) -> None:
    model = rw.regularize(built(put), {"0": (L1(0.3), L2(0.2))})
    model.eval()(batch())
    w = model[0].weight
    torch.testing.assert_close(model.reg_loss, 0.3 * w.abs().sum() + 0.1 * w.square().sum())
    assert list(rw.penalties(model)) == ["0.weight"]
    model.train()
    torch.testing.assert_close(rw.penalties(model)["0.weight"], model.reg_loss)


@every
def test_the_gradient_reaches_what_it_is_computed_from(put: Any) -> None:
    model, hand = rw.regularize(built(put), {"0": L2(0.2)}).eval(), built(put).eval()
    hand(batch())  # the old spectral_norm computes its weight in the forward
    model.reg_loss.backward()
    (0.1 * hand[0].weight.square().sum()).backward()
    ours, theirs = (
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, hand)
    )
    assert ours
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


@every
def test_reading_has_no_side_effect(put: Any) -> None:
    model = rw.regularize(built(put), {"": L2(0.2, on="all")})
    model.train()
    before = support.fingerprint(model)
    random = torch.get_rng_state()
    _ = model.reg_loss, rw.penalties(model), rw.policy(model).rows(), rw.plan(model, L1(0.1))
    after = support.fingerprint(model)
    lines = [line for line in support.differences(before, after) if "calls" not in str(line)]
    assert not [line for line in lines if put is not MACHINERY["noisy"]]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())


def test_no_parametrization_runs_in_training_for_a_read() -> None:
    model = rw.regularize(built(MACHINERY["noisy"]), L2(0.2))
    noisy = model[0].parametrizations.weight[0]
    noisy.calls = noisy.train_calls = 0
    _ = model.reg_loss
    assert (noisy.calls, noisy.train_calls) == (1, 0)
    noisy.eval()  # a part that is in eval stays there
    _ = model.reg_loss
    assert not noisy.training


def test_a_parametrization_that_fails_leaves_the_modes_as_they_were() -> None:
    class Fragile(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            raise ValueError("no weight today")

    model = rw.regularize(built(_register(Symmetric)), L2(0.2))
    model[0].parametrizations.weight.append(Fragile())
    with pytest.raises(ValueError, match="no weight today"):
        _ = model.reg_loss
    assert all(module.training for module in model.modules())


@every
def test_it_is_discovered_where_named_parameters_does_not_show_it(put: Any) -> None:
    model = built(put)
    rows = {(e.path, e.site): e for e in rw.plan(model, L2(0.2, on="all"))}
    assert set(rows) == {("0", "weight"), ("0", "bias"), ("2", "weight"), ("2", "bias")}
    row = rows["0", "weight"]
    assert (row.mechanism, row.shape) == ("direct", (4, 4))
    assert "parametrized: its effective value counts" in row.note
    for where in ("0.weight", "*.weight", nn.Linear, lambda path, module: path == "0"):
        assert ("0", "weight") in {(e.path, e.site) for e in rw.plan(model, {where: L2(0.2)})}


def test_a_layer_inside_a_parametrization_is_no_site() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, w: Tensor) -> Tensor:
            return self.net(w)

    model = built(_register(Hyper))
    assert [e.path for e in rw.plan(model, {nn.Linear: L2(0.2)})] == ["0", "2"]
    with pytest.raises(rw.UnmatchedRule):
        rw.plan(model, {"0.parametrizations.weight.0.net": L2(0.2)})


@every
def test_undo_leaves_the_machinery_alone(put: Any) -> None:
    model = built(put)
    before = support.fingerprint(model)
    rw.unregularize(rw.regularize(model, {"": (L1(0.3), L2(0.2, on="all"))}))
    lines = support.differences(before, support.fingerprint(model))
    assert not [line for line in lines if put is not MACHINERY["noisy"]]


@pytest.mark.parametrize(
    "term", [GroupLasso(0.2), Orthogonal(0.2), Penalty(torch.norm, 0.2), L2SP(0.2)]
)
def test_every_term_reads_the_effective_weight(term: Any) -> None:
    model = rw.regularize(built(parametrizations.weight_norm), {"0": term})
    if isinstance(term, L2SP):
        with torch.no_grad():
            start = model[0].weight.clone()
            model[0].parametrizations.weight.original0.add_(1)
        wanted = 0.1 * (model[0].weight - start).square().sum()
    else:
        wanted = term.value(model[0].weight)
    torch.testing.assert_close(model.reg_loss, wanted)


def test_machinery_that_comes_or_goes_later_is_followed() -> None:
    model = rw.regularize(nn.Sequential(nn.Linear(4, 4)), L2(1.0))
    for change in (
        lambda: parametrize.register_parametrization(model[0], "weight", Symmetric()),
        lambda: parametrize.remove_parametrizations(model[0], "weight"),
        lambda: parametrizations.weight_norm(model[0]),
    ):
        change()
        torch.testing.assert_close(model.reg_loss, model[0].weight.square().sum() / 2)
        assert list(rw.penalties(model)) == ["0.weight"]
    rw.unregularize(model)
    assert model[0].parametrizations.weight.ntensors == 2


def test_a_parametrized_root_that_is_undone_later() -> None:
    model = rw.regularize(nn.Linear(4, 4), L2(1.0))
    parametrize.register_parametrization(model, "weight", Symmetric())
    torch.testing.assert_close(model.reg_loss, model.weight.square().sum() / 2)
    parametrize.remove_parametrizations(model, "weight")
    torch.testing.assert_close(model.reg_loss, model.weight.square().sum() / 2)
    assert type(rw.unregularize(model)) is nn.Linear


def test_a_cached_read_neither_fills_nor_takes_the_cache() -> None:
    model = rw.regularize(built(parametrizations.weight_norm), {"0": L2(1.0)})
    with parametrize.cached():
        loss = model.reg_loss
        assert not parametrize._cache
        w = model[0].weight
        torch.testing.assert_close(loss, w.square().sum() / 2)
        (model(batch()).sum() + model.reg_loss).backward()
    assert model[0].parametrizations.weight.original0.grad is not None


def test_a_frozen_base_counts_as_long_as_something_it_is_computed_from_learns() -> None:
    model = built(_register(lambda: LowRank(4, 4)))
    model[0].parametrizations.weight.original.requires_grad_(False)
    rw.regularize(model, {"0": L2(1.0)})
    torch.testing.assert_close(model.reg_loss, model[0].weight.square().sum() / 2)
    for p in model[0].parametrizations.parameters():
        p.requires_grad_(False)
    assert model.reg_loss == 0
    assert "frozen: does not count" in rw.policy(model).rows()[0]["note"]


def test_spectral_norm_trains_as_without_us() -> None:
    model, hand = (built(parametrizations.spectral_norm) for _ in range(2))
    rw.regularize(model, {"0": L2(0.0)})
    for each in (model, hand):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = each(batch()).square().sum()
            (loss + rw.reg_loss(each)).backward()
            optimizer.step()
    assert support.digest(dict(model.state_dict())) == support.digest(dict(hand.state_dict()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_read_compiles_with_the_step() -> None:
    torch.compiler.reset()
    for name in ("weight_norm", "symmetric", "spectral_norm"):
        model = rw.regularize(built(MACHINERY[name]), {"0": L2(0.3)}).eval()
        step = torch.compile(
            lambda x, model=model: model(x).sum() + model.reg_loss,
            fullgraph=True,
            backend="aot_eager",
        )
        torch.testing.assert_close(step(batch()), model(batch()).sum() + model.reg_loss)
    torch.compiler.reset()


# ---- LoRA by PEFT ----------------------------------------------------------------------------

peft = pytest.importorskip("peft", reason="peft is not installed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.q_proj(x).tanh())


def lora(model: nn.Module, **how: Any) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **how)
    return peft.get_peft_model(model, config)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_under_lora_the_frozen_base_does_not_count_and_the_table_says_so() -> None:
    model = rw.regularize(lora(net()), L2(1.0))
    notes = {f"{e.path}.{e.site}": e.note for e in rw.policy(model)}
    base = "base_model.model.q_proj.base_layer.weight"
    assert notes[base] == "frozen: does not count"
    layers = model.base_model.model.q_proj
    a, b = layers.lora_A["default"].weight, layers.lora_B["default"].weight
    torch.testing.assert_close(model.reg_loss, (a.square().sum() + b.square().sum()) / 2)
    found = rw.penalties(model)
    assert found[base] == 0
    assert found["base_model.model.q_proj.lora_A.default.weight"] > 0


def test_rules_name_the_adapters() -> None:
    model = rw.regularize(lora(net()), {"**.lora_A": L1(1.0)})
    assert [e.path for e in rw.policy(model)] == ["base_model.model.q_proj.lora_A.default"]


def test_a_policy_from_before_lora_stays_and_its_frozen_weights_stop_counting() -> None:
    inner = rw.regularize(net(), L2(1.0))
    before = inner.reg_loss
    model = lora(inner)
    assert before > 0
    assert rw.reg_loss(model) == 0
    merged = model.merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(True)
    wanted = (merged.q_proj.weight.square().sum() + merged.head.weight.square().sum()) / 2
    torch.testing.assert_close(rw.reg_loss(merged), wanted)
    assert type(rw.unregularize(merged)) is Net


def test_a_module_that_peft_copies_counts_once() -> None:
    model = lora(rw.regularize(net(), L2(1.0)), modules_to_save=["head"])
    head = model.base_model.model.head.modules_to_save["default"]
    torch.testing.assert_close(rw.reg_loss(model), head.weight.square().sum() / 2)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(rw.reg_loss(twin), rw.reg_loss(model))
