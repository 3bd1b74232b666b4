"""Terms that change the weight: DropConnect and the hadamard form of L1."""

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize

import regwrap as rw
from regwrap import L1, L2, DropConnect, Dropout, ElasticNet, WeightDecay
from regwrap.surgery import weight

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

HADAMARD = L1(0.1, solver="hadamard")
TERMS = {
    "dropconnect": DropConnect(0.4),
    "hadamard": HADAMARD,
    "both": (HADAMARD, DropConnect(0.4)),
}
every_term = pytest.mark.parametrize("term", TERMS.values(), ids=list(TERMS))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).tanh())


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def linear() -> nn.Linear:
    return nn.Linear(4, 3)


def built(make: Callable[[], nn.Module] = Mlp) -> Any:
    torch.manual_seed(0)
    return make()


def batch(rows: int = 6) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(batch()).square().mean() + rw.reg_loss(model)).backward()
        optimizer.step()


def _listed(term: Any) -> list[Any]:
    return list(term) if isinstance(term, tuple) else [term]


def same_state(left: nn.Module, right: nn.Module) -> bool:
    return support.digest(dict(left.state_dict())) == support.digest(dict(right.state_dict()))


# ---- DropConnect -----------------------------------------------------------------------------


def test_dropconnect_drops_elements_of_the_weight_at_its_rate() -> None:
    model = rw.regularize(nn.Linear(400, 300), DropConnect(0.3))
    plain = rw.sites.plain(model, "weight")
    masked = model.weight
    assert torch.all((masked == 0) | torch.isclose(masked, plain / 0.7))
    assert abs((masked == 0).float().mean() - 0.3) < 0.01


def test_dropconnect_keeps_the_expectation() -> None:
    model = rw.regularize(built(linear), DropConnect(0.5))
    mean = torch.stack([model.weight.detach() for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, rw.sites.plain(model, "weight").data, rtol=0.1, atol=0.02)


def test_dropconnect_draws_once_a_read_under_the_seed() -> None:
    model = rw.regularize(built(linear), DropConnect(0.5))
    torch.manual_seed(3)
    first, second = model.weight, model.weight
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(model.weight, first)
    torch.manual_seed(3)
    want = nn.functional.linear(
        batch(), nn.functional.dropout(rw.sites.plain(model, "weight"), 0.5)
    )
    torch.manual_seed(3)
    torch.testing.assert_close(model(batch()), want + model.bias)


def test_dropconnect_leaves_eval_and_the_penalties_unmasked() -> None:
    model, plain = rw.regularize(built(), {"": [DropConnect(0.5), L2(1.0)]}), built()
    wanted = sum((m.weight.square().sum() / 2 for m in (plain.fc1, plain.fc2)), torch.zeros(()))
    for _ in range(2):
        torch.testing.assert_close(model.reg_loss, wanted)
    assert torch.equal(model.eval()(batch()), plain.eval()(batch()))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model.train()
    _ = model.reg_loss, rw.penalties(model), rw.policy(model).rows()
    rw.summary(model, values=True, console=_quiet())
    rw.regularize(model, {"fc1": L2(2.0)})
    copy.deepcopy(model)
    assert torch.equal(torch.get_rng_state(), before)


def _quiet() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO())


def test_dropconnect_gives_the_gradient_of_the_masked_weight() -> None:
    model = rw.regularize(built(linear), DropConnect(0.5))
    own = rw.sites.plain(model, "weight")
    torch.manual_seed(2)
    model(batch()).sum().backward()
    torch.manual_seed(2)
    mask = nn.functional.dropout(torch.ones_like(own), 0.5)
    torch.testing.assert_close(own.grad, mask * batch().sum(0).expand(3, 4))


def test_dropconnect_of_rate_zero_installs_nothing() -> None:
    model = rw.regularize(built(), DropConnect(0))
    assert not parametrize.is_parametrized(model.fc1)
    row = next(r for r in rw.policy(model).rows() if r["path"] == "fc1")
    assert (row["mechanism"], row["note"]) == (None, "rate 0: installs nothing")


def test_dropconnect_of_a_complex_weight_drops_both_parts() -> None:
    model = rw.regularize(nn.Linear(30, 30, dtype=torch.complex64), DropConnect(0.5))
    masked, plain = model.weight, rw.sites.plain(model, "weight")
    assert 0.4 < (masked == 0).float().mean() < 0.6
    assert torch.all((masked == 0) | torch.isclose(masked, plain * 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dropconnect_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = rw.regularize(linear().to(dtype), DropConnect(0.5))
    assert model.weight.dtype == dtype
    assert model(batch().to(dtype)).dtype == dtype


def test_dropconnect_of_a_bias_by_name() -> None:
    model = rw.regularize(nn.Linear(4, 300), {"bias": DropConnect(0.5)})
    assert 0.3 < (model.bias == 0).float().mean() < 0.7
    assert list(model.state_dict()) == ["weight", "bias"]


def test_a_sparse_embedding_under_dropconnect_trains_with_a_dense_gradient() -> None:
    model = rw.regularize(nn.Embedding(5, 3, sparse=True), DropConnect(0.5))
    model(torch.tensor([1, 2])).sum().backward()
    grad = rw.sites.plain(model, "weight").grad
    assert grad.to_dense()[[0, 3, 4]].abs().sum() == 0


# ---- hadamard --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_hadamard_starts_at_the_same_weight_bit_for_bit(dtype: torch.dtype) -> None:
    plain = nn.Linear(40, 30).to(dtype)
    model = rw.regularize(copy.deepcopy(plain), HADAMARD)
    assert torch.equal(model.weight, plain.weight)
    x = torch.randn(5, 40).to(dtype)
    assert torch.equal(model(x), plain(x))


def test_hadamard_penalises_both_factors() -> None:
    model = rw.regularize(built(linear), L1(0.3, solver="hadamard"))
    u, v = model.parametrizations.weight.parameters()
    wanted = 0.15 * (u.square().sum() + v.square().sum())
    torch.testing.assert_close(model.reg_loss, wanted)
    assert list(rw.penalties(model)) == ["weight"]


def test_the_least_penalty_over_all_factors_is_the_l1() -> None:
    """At |u| = |v| = sqrt|w| it is the L1, and every other split of the same w costs more."""
    model = rw.regularize(built(linear), L1(0.3, solver="hadamard"))
    plain = built(linear).weight.detach()
    u, v = model.parametrizations.weight.parameters()
    with torch.no_grad():
        assert model.reg_loss > 0.3 * plain.abs().sum()
        u.copy_(plain.sign() * plain.abs().sqrt())
        v.copy_(plain.abs().sqrt())
    torch.testing.assert_close(model.weight, plain)
    torch.testing.assert_close(model.reg_loss, 0.3 * plain.abs().sum())


def test_hadamard_reaches_the_lasso_solution() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 8, dtype=torch.float64)
    y = x @ torch.tensor([[2.0, -1, 0, 0, 0, 0.5, 0, 0]], dtype=torch.float64).T
    model = nn.Linear(8, 1, bias=False, dtype=torch.float64)
    rw.regularize(model, L1(0.2, solver="hadamard"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2500)
    for _ in range(2500):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() / 2 + model.reg_loss).backward()
        optimizer.step()
        schedule.step()
    from sklearn.linear_model import Lasso

    wanted = Lasso(0.2, fit_intercept=False, tol=1e-12).fit(x.numpy(), y.numpy().ravel()).coef_
    torch.testing.assert_close(
        model.weight[0], torch.as_tensor(wanted), rtol=0, atol=1e-4, check_stride=False
    )


def test_hadamard_stacks_with_a_penalty_of_the_effective_weight() -> None:
    model = rw.regularize(built(linear), (HADAMARD, L2(0.2)))
    u, v = model.parametrizations.weight.parameters()
    wanted = 0.05 * (u.square().sum() + v.square().sum()) + 0.1 * (u * v).square().sum()
    torch.testing.assert_close(model.reg_loss, wanted)


# ---- state_dict ------------------------------------------------------------------------------


@every_term
@pytest.mark.parametrize("make", [Mlp, Nested, linear])
def test_the_checkpoint_is_that_of_the_plain_model(term: Any, make: Any) -> None:
    model, plain = rw.regularize(built(make), {"": term}), built(make)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert support.digest(dict(ours)) == support.digest(dict(theirs))
    assert list(ours) == list(theirs)
    assert ours._metadata == theirs._metadata
    for prefix in ("a.", ""):
        kept = {"other": torch.ones(())}
        assert list(model.state_dict(destination=dict(kept), prefix=prefix)) == list(
            plain.state_dict(destination=dict(kept), prefix=prefix)
        )
    assert all(isinstance(v, Tensor) for v in model.state_dict(keep_vars=True).values())


@every_term
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [Mlp, Nested, linear])
def test_it_loads_strictly_both_ways(term: Any, assign: bool, make: Any) -> None:
    model, plain = rw.regularize(built(make), {"": term}), built(make)
    train(model)
    plain.load_state_dict(model.state_dict(), strict=True, assign=assign)
    assert torch.equal(plain.eval()(batch()), model.eval()(batch()))
    other = rw.regularize(make(), {"": term})
    before = [name for name, _ in other.named_parameters()]
    other.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    assert torch.equal(plain(batch()), other.eval()(batch()))
    assert [name for name, _ in other.named_parameters()] == before
    assert all(p.requires_grad for p in other.parameters())
    train(other.train())


@every_term
def test_a_part_saves_and_loads_on_its_own(term: Any) -> None:
    model, plain = rw.regularize(built(Nested), {"": term}), Nested()
    plain.inner.load_state_dict(model.inner.state_dict())
    plain.head.load_state_dict(model.head.state_dict())
    assert torch.equal(plain.eval()(batch()), model.eval()(batch()))
    model.inner.fc1.load_state_dict({"weight": torch.ones(5, 4), "bias": torch.zeros(5)})
    assert torch.equal(model.inner.fc1.weight, torch.ones(5, 4))


@every_term
def test_what_is_missing_or_unexpected_has_its_plain_name(term: Any) -> None:
    model = rw.regularize(built(Nested), {"": term})
    before = copy.deepcopy(model.state_dict())
    state = {"inner.fc2.bias": torch.ones(3), "inner.fc1.nothing": torch.ones(1)}
    found = model.load_state_dict(state, strict=False)
    plain = Nested().load_state_dict(state, strict=False)
    assert sorted(found.missing_keys) == sorted(plain.missing_keys)
    assert found.unexpected_keys == plain.unexpected_keys
    after = model.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["inner.fc2.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"inner.fc1.weight"'):
        model.load_state_dict(state)


@every_term
def test_a_checkpoint_by_its_own_names_loads_too(term: Any) -> None:
    """One that was written key by key from `named_parameters`, by an EMA say."""
    model = rw.regularize(built(), {"": term})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    other = rw.regularize(built(), {"": term})
    other.load_state_dict({**dict(model.named_parameters()), **dict(model.named_buffers())})
    assert same_state(model, other)


# ---- parameters and their order --------------------------------------------------------------


@every_term
def test_the_parameter_itself_stays(term: Any) -> None:
    """Under hadamard it is U, so that undo gives the very parameter back."""
    model = built()
    own = model.fc1.weight
    rw.regularize(model, {"": term})
    assert any(p is own for p in model.parameters())
    rw.unregularize(model)
    assert model.fc1.weight is own


@every_term
def test_the_order_of_parameters_is_kept_where_it_can_be_and_said_where_not(term: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Embedding(3, 4))
    plain = [tuple(p.shape) for p in model.parameters()]
    rw.regularize(model, {"": term})
    notes = {e.path: e.note for e in rw.policy(model)}
    assert notes["0"] == notes["2"] == ""
    assert notes["1"] == "in parameters() it comes after the layer's others"
    del model[1]
    assert len(plain) == 4


def test_an_optimizer_made_before_dropconnect_trains_on() -> None:
    model = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rw.regularize(model, DropConnect(0.4))
    before = model.state_dict()["fc1.weight"].clone()
    model(batch()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.state_dict()["fc1.weight"], before)


@every_term
def test_param_groups_take_the_stored_tensors(term: Any) -> None:
    model = rw.regularize(built(), {"": [*_listed(term), L2(0.1)]})
    rw.regularize(model, {"fc1": WeightDecay(0.3)})
    groups = rw.param_groups(model, weight_decay=0.01)
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    rates = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert {rates[id(p)] for p in rw.sites.stored(model.fc1, "weight")} == {0.3}
    assert {rates[id(p)] for p in rw.sites.stored(model.fc2, "weight")} == {0.01}
    assert {rates[id(m.bias)] for m in (model.fc1, model.fc2)} == {0.0}


def test_an_authors_mark_stays_on_the_factors_and_comes_back() -> None:
    model = built()
    model.fc1.weight._no_weight_decay = True
    rw.regularize(model, {"fc1.weight": HADAMARD})
    assert all(p._no_weight_decay for p in model.fc1.parametrizations.weight.parameters())
    rw.unregularize(model)
    assert model.fc1.weight._no_weight_decay


# ---- copies ----------------------------------------------------------------------------------


def _through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _through_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies = pytest.mark.parametrize("copied", [copy.deepcopy, _through_pickle, _through_save])


@every_term
@copies
@pytest.mark.parametrize("make", [Mlp, Nested, linear])
def test_a_copy_behaves_as_the_model_and_shares_nothing(term: Any, copied: Any, make: Any) -> None:
    model = rw.regularize(built(make), {"": term})
    train(model)
    twin = copied(model)
    assert type(twin).__name__ == type(model).__name__
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert twin.reg_loss == model.reg_loss
    for each in (model, twin):
        train(each)
    assert same_state(model, twin)
    before = copy.deepcopy(model.state_dict())
    rw.unregularize(twin)
    assert list(dict(twin.named_parameters())) == list(dict(built(make).named_parameters()))
    assert support.digest(dict(before)) == support.digest(dict(twin.state_dict()))
    torch.manual_seed(5)
    model.train()(batch())
    assert any(map(parametrize.is_parametrized, model.modules()))


@every_term
def test_it_pickles_into_a_new_process_and_is_undone_there(term: Any) -> None:
    model = rw.regularize(built(linear), term)
    code = (
        "import sys, pickle, torch, regwrap as rw\n"
        "model = pickle.load(sys.stdin.buffer)\n"
        "model.train()(torch.ones(2, 4)); loss = model.reg_loss.item()\n"
        "rw.unregularize(model)\n"
        "assert type(model) is torch.nn.Linear, type(model)\n"
        "assert [n for n, _ in model.named_parameters()] == ['weight', 'bias']\n"
        "print(loss, model.weight.sum().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(model), capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr.decode()
    loss, total = map(float, run.stdout.split())
    assert loss == pytest.approx(model.reg_loss.item())
    assert total == pytest.approx(model.state_dict()["weight"].sum().item(), rel=1e-5)


# ---- undo and second calls -------------------------------------------------------------------


@every_term
@pytest.mark.parametrize("make", [Mlp, Nested, linear])
def test_undo_is_exact(term: Any, make: Any) -> None:
    model = built(make)
    before = support.fingerprint(model)
    rw.unregularize(rw.regularize(model, {"": term}))
    assert not support.differences(before, support.fingerprint(model))


@every_term
def test_undo_keeps_what_was_trained_and_what_is_frozen(term: Any) -> None:
    model = built()
    model.fc2.weight.requires_grad_(False)
    rw.regularize(model, {"": term})
    train(model)
    trained = copy.deepcopy(model.state_dict())
    rw.unregularize(model)
    assert support.digest(dict(trained)) == support.digest(dict(model.state_dict()))
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    assert torch.equal(model.fc2.weight, built().fc2.weight)


def test_a_second_call_changes_the_rate_and_keeps_the_mask_where_it_is() -> None:
    model = rw.regularize(built(), DropConnect(0.4))
    mask = model.fc1.parametrizations.weight[0]
    rw.regularize(model, {"fc1": DropConnect(0.2)})
    assert model.fc1.parametrizations.weight[0] is mask
    assert (mask.p, model.fc2.parametrizations.weight[0].p) == (0.2, 0.4)
    rw.regularize(model, {"fc1": DropConnect(0)})
    assert not parametrize.is_parametrized(model.fc1)
    rw.regularize(model, {"": None})
    assert not any(map(parametrize.is_parametrized, model.modules()))
    before = support.fingerprint(built(), identity=False)
    assert not support.differences(
        before, support.fingerprint(rw.unregularize(model), identity=False)
    )


def test_a_second_call_leaves_the_trained_factors_alone() -> None:
    model = rw.regularize(built(), HADAMARD)
    train(model)
    u, v = model.fc1.parametrizations.weight.parameters()
    value = u.clone()
    rw.regularize(model, {"fc1": [L1(0.5, solver="hadamard"), DropConnect(0.1)]})
    assert [id(p) for p in model.fc1.parametrizations.weight.parameters()] == [id(u), id(v)]
    assert torch.equal(u, value)


@pytest.mark.parametrize("first", ["dropconnect", "hadamard"])
def test_both_on_one_weight_mask_the_product_in_either_order(first: str) -> None:
    second = "hadamard" if first == "dropconnect" else "dropconnect"
    model = built(linear)
    for name in (first, second):
        rw.regularize(model, TERMS[name])
    plain = built(linear).weight
    masked = model.weight
    assert torch.all((masked == 0) | torch.isclose(masked, plain / 0.6))
    assert torch.equal(model.eval().weight, plain)
    u, v = model.parametrizations.weight.parameters()
    torch.testing.assert_close(model.reg_loss, 0.05 * (u.square().sum() + v.square().sum()))
    rw.regularize(model, [("", None), ("", TERMS[second])])
    rw.unregularize(model)
    assert type(model) is nn.Linear


def test_l1_without_a_solver_takes_the_factors_back() -> None:
    model = rw.regularize(built(linear), HADAMARD)
    rw.regularize(model, L1(0.1))
    assert not parametrize.is_parametrized(model)
    torch.testing.assert_close(model.reg_loss, 0.1 * model.weight.abs().sum())


@every_term
def test_a_failure_half_way_leaves_the_model_as_it_was(term: Any, monkeypatch: Any) -> None:
    model = rw.regularize(built(), {"fc1": DropConnect(0.1)})
    model.fc1.weight.sum().backward()
    before = support.fingerprint(model)
    put = weight._put

    def fail(module: nn.Module, name: str, parametrization: nn.Module) -> None:
        if module is model.fc2:
            raise MemoryError
        put(module, name, parametrization)

    monkeypatch.setattr(weight, "_put", fail)
    with pytest.raises(MemoryError):
        rw.regularize(model, {"": term, "norm": L2(0.1, on="all")})
    assert not support.differences(before, support.fingerprint(model))


# ---- other parametrizations ------------------------------------------------------------------


class Double(nn.Module):
    """One tensor in, one out, and a buffer and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("two", torch.tensor(2.0))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, w: Tensor) -> Tensor:
        return self.two * self.scale * w


FOREIGN: dict[str, Callable[[nn.Module], Any]] = {
    "double": lambda m: parametrize.register_parametrization(m, "weight", Double()),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm": parametrizations.weight_norm,
    "bias": lambda m: parametrize.register_parametrization(m, "bias", Double()),
}
foreign = pytest.mark.parametrize("put", FOREIGN.values(), ids=list(FOREIGN))


@every_term
@foreign
@pytest.mark.parametrize("ours_first", [False, True])
def test_they_stack_with_another_parametrization(term: Any, put: Any, ours_first: bool) -> None:
    if put is parametrizations.weight_norm and (ours_first or term != DropConnect(0.4)):
        pytest.skip("weight_norm makes two tensors of a plain weight: below")
    if put is parametrizations.orthogonal and ours_first:
        pytest.skip("orthogonal reads and assigns the weight, which is a mask's draw")
    steps = [lambda m: rw.regularize(m, {"": term}), put]
    model, plain = built(linear), built(linear)
    torch.manual_seed(1)
    put(plain)
    torch.manual_seed(1)
    for step in steps if ours_first else steps[::-1]:
        step(model)
    if put is not parametrizations.spectral_norm:  # its first vectors are drawn when it is put on
        assert torch.equal(model.eval().weight, plain.eval().weight)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert same_state(model, plain)
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model.eval().weight, plain.eval().weight)
    model.train()
    if term != HADAMARD and put is not FOREIGN["bias"]:
        assert (model.weight == 0).any()
        assert not torch.equal(model.weight, model.weight)
    rw.unregularize(model)
    model.load_state_dict(plain.train().state_dict())  # spectral_norm's vectors have moved on
    before, after = (support.fingerprint(m, identity=False) for m in (plain, model))
    lines = support.differences(before, after)
    if put is parametrizations.weight_norm:  # its load hook stands under a number of the process
        lines = [line for line in lines if "attributes/14" not in line]
    assert not lines


def test_weight_norm_over_dropconnect_normalises_the_masked_weight_and_is_left_by_undo() -> None:
    model = rw.regularize(built(linear), DropConnect(0.4))

    class Unit(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / w.norm(dim=1, keepdim=True).clamp_min(1e-6)

    parametrize.register_parametrization(model, "weight", Unit())
    norms = model.weight.norm(dim=1)
    assert torch.all((norms == 0) | torch.isclose(norms, torch.ones(())))
    rw.regularize(model, L2(1.0))
    torch.testing.assert_close(model.reg_loss, torch.tensor(1.5))
    rw.unregularize(model)
    assert [type(p) for p in model.parametrizations.weight] == [Unit]
    assert type(model).__name__ == "ParametrizedLinear"
    torch.testing.assert_close(model.weight.norm(dim=1), torch.ones(3))


def test_a_penalty_under_hadamard_and_a_parametrization_with_parameters_of_its_own() -> None:
    model = built(linear)
    parametrize.register_parametrization(model, "weight", Double(), unsafe=True)
    del model.parametrizations.weight[0].scale
    model.parametrizations.weight[0].scale = 1.0
    rw.regularize(model, HADAMARD)
    model.parametrizations.weight.append(Double())
    u, v = rw.sites.factors(model, "weight")
    torch.testing.assert_close(model.reg_loss, 0.05 * (u.square().sum() + v.square().sum()))


# ---- refusals --------------------------------------------------------------------------------


def _lstm() -> nn.Module:
    return nn.Sequential(nn.LSTM(3, 3))


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def _normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def _legacy() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)))


REFUSED = [
    (_lstm, DropConnect(0.5), "'0.weight_ih_l0', which LSTM keeps in a list of its own; penalise"),
    (
        _tied,
        HADAMARD,
        "'0.weight', which is shared under several names; use L1 without solver=, or",
    ),
    (_lazy, DropConnect(0.5), "'0.weight', which is lazy; regularize after the first forward, or"),
    (_normed, HADAMARD, "'0.weight', which is parametrized by several tensors; use L1 without"),
    (
        _legacy,
        DropConnect(0.5),
        "'0.weight', which is computed in a hook by the old weight_norm, spectral_norm or prune; "
        "use torch.nn.utils.parametrizations, or make it permanent, first, or leave it out with "
        "{'0.weight': None}.",
    ),
]


@pytest.mark.parametrize(("make", "term", "message"), REFUSED, ids=[r[0].__name__ for r in REFUSED])
def test_what_cannot_be_is_refused_by_name(make: Any, term: Any, message: str) -> None:
    model = make()
    before = support.fingerprint(model)
    with pytest.raises(rw.PolicyError, match=re.escape(f"cannot act on {message}")):
        rw.regularize(model, {"": term})
    assert not support.differences(before, support.fingerprint(model))


def test_assigning_a_weight_under_dropconnect_names_what_to_assign() -> None:
    model = rw.regularize(built(linear), DropConnect(0.5))
    with pytest.raises(NotImplementedError, match=r"parametrizations\.<name>\.original"):
        model.weight = torch.ones(3, 4)
    with pytest.raises(NotImplementedError, match="name in functional_call"):
        torch.func.functional_call(model, {"weight": torch.ones(3, 4)}, (batch(),))
    own = {"parametrizations.weight.original": torch.ones(3, 4)}
    out = torch.func.functional_call(model.eval(), own, (batch(),))
    torch.testing.assert_close(out, batch() @ torch.ones(4, 3) + model.bias)


# ---- tied weights, dropout beside, compile ---------------------------------------------------


def test_dropconnect_of_a_tied_weight_masks_every_layer_and_stays_tied() -> None:
    model = _tied()
    own = model[0].weight
    rw.regularize(model, (DropConnect(0.5), L2(1.0)))
    assert list(model.state_dict()) == list(_tied().state_dict())
    torch.testing.assert_close(model.reg_loss, own.square().sum() / 2)
    assert len(list(model.parameters())) == 3
    twin = copy.deepcopy(model)
    assert twin[0].parametrizations.weight.original is twin[1].parametrizations.weight.original
    for each in (model, twin):
        rw.unregularize(each)
        assert each[0].weight is each[1].weight
    assert model[0].weight is own


def test_dropconnect_beside_a_dropout_and_an_elastic_net() -> None:
    rules = {"": [DropConnect(0.3), *ElasticNet(0.1, 0.5)], "fc1": Dropout(0.5)}
    model, plain = rw.regularize(built(), rules), rw.regularize(built(), ElasticNet(0.1, 0.5))
    torch.testing.assert_close(model.reg_loss, plain.reg_loss)
    train(model)
    rw.unregularize(model)


@every_term
def test_it_compiles_to_one_graph_a_mode(term: Any) -> None:
    torch.compiler.reset()
    model, plain = (rw.regularize(built(), {"": term}) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        for each, called in ((model, fast), (plain, plain)):
            torch.manual_seed(3)
            (called(batch()).sum() + each.reg_loss).backward()
    assert counter.frame_count == 1
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(fast.eval()(batch()), plain.eval()(batch()))
    torch.compiler.reset()


@every_term
def test_it_exports_in_eval(term: Any) -> None:
    model = rw.regularize(built(), {"": term}).eval()
    program = torch.export.export(model, (batch(),))
    torch.testing.assert_close(program.module()(batch()), model(batch()))


def test_cached_reads_draw_one_mask_and_the_penalty_does_not_see_it() -> None:
    model = rw.regularize(built(linear), (DropConnect(0.5), L2(1.0)))
    with parametrize.cached():
        assert model.reg_loss == built(linear).weight.square().sum() / 2
        assert torch.equal(model.weight, model.weight)
        assert (model.weight == 0).any()
    assert not parametrize._cache


def test_hadamard_grad_checks() -> None:
    model = rw.regularize(nn.Linear(2, 2, dtype=torch.float64), HADAMARD)
    names, tensors = zip(*model.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        x = torch.ones(1, 2, dtype=torch.float64)
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(loss, tensors)
