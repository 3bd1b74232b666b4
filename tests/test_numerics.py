"""Dtypes, torch.func, higher derivatives, layouts, and what no weight should do to another."""

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap

import regwrap as rw
from regwrap import L1, L2, L2SP, DropConnect, GroupLasso, Orthogonal, Penalty

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and none is at hand")

TERMS = (
    L1(0.3),
    L2(0.2),
    GroupLasso(0.1),
    Orthogonal(0.4),
    L2SP(0.5),
    Penalty(torch.norm, 0.1),
)
every_term = pytest.mark.parametrize("term", TERMS, ids=[type(t).__name__ for t in TERMS])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).tanh())


class WithLoss(Mlp):
    """Reads its penalties inside its forward, as a model that returns its loss does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean() + rw.reg_loss(self)


def built(cls: type[nn.Module] = Mlp, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return cls()


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def batch() -> Tensor:
    return X.clone()


def params(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- dtypes ----------------------------------------------------------------------------------


@every_term
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_value_is_float32_or_wider_and_the_gradient_the_weights(term: Any, dtype: Any) -> None:
    if isinstance(term, Penalty):
        term = Penalty(lambda w: w.float().norm(), 0.1)
    model = built().to(dtype)
    rw.regularize(model, term)
    wide = torch.float64 if dtype == torch.float64 and not isinstance(term, Penalty) else None
    assert model.reg_loss.dtype == (wide or torch.float32)
    model.reg_loss.backward()
    assert model.fc1.weight.grad.dtype == dtype
    other = rw.regularize(built().to(dtype).double(), term)
    torch.testing.assert_close(model.reg_loss.double(), other.reg_loss.double(), rtol=1e-5, atol=0)


def test_a_mixed_model_takes_the_widest_and_the_sites_add_up() -> None:
    model = built()
    model.fc1.half()
    model.fc2.double()
    rw.regularize(model, L2(1.0))
    assert model.reg_loss.dtype == torch.float64
    torch.testing.assert_close(sum(rw.penalties(model).values()), model.reg_loss)


def test_half_sums_do_not_overflow_or_stall() -> None:
    model = nn.Linear(1000, 100, bias=False).half()
    nn.init.constant_(model.weight, 300.0)
    rw.regularize(model, (L1(1.0), L2(2.0)))
    assert model.reg_loss.item() == pytest.approx(1e5 * (300 + 300**2), rel=1e-6)
    nn.init.constant_(model.weight, 1e-4)
    small = model.weight[0, 0].item()
    assert model.reg_loss.item() == pytest.approx(1e5 * (small + small**2), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_penalty_in_float32(dtype: torch.dtype) -> None:
    model = rw.regularize(built(), TERMS[:-1])
    outside = model.reg_loss
    with torch.autocast("cpu", dtype=dtype):
        model(batch())
        inside = model.reg_loss
        assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)


def test_a_grad_scaler_scales_penalty_and_loss_alike() -> None:
    model, plain = rw.regularize(built(), L2(0.3)), rw.regularize(built(), L2(0.3))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(model(batch()).square().mean() + model.reg_loss).backward()
    scaler.unscale_(optimizer)
    (plain(batch()).square().mean() + plain.reg_loss).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# ---- derivatives -----------------------------------------------------------------------------


@every_term
def test_the_gradient_is_the_derivative_and_the_second_derivative_is_its(term: Any) -> None:
    model = rw.regularize(built().double(), term)
    if isinstance(term, L2SP):
        with torch.no_grad():
            model.fc1.weight.add_(1)
    names = list(params(model))

    def loss(*values: Tensor) -> Tensor:
        return functional_call(reader, dict(zip(names, values, strict=True)), ())

    reader = Reader(model)
    names = [f"model.{name}" for name in names]
    values = [p.requires_grad_() for p in params(model).values()]
    assert torch.autograd.gradcheck(loss, values)
    assert torch.autograd.gradgradcheck(loss, values)


class Reader(nn.Module):
    """A forward that is nothing but the penalties."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return rw.reg_loss(self.model)


def test_double_backward_through_output_penalties() -> None:
    model = rw.regularize(built().double(), {"fc1": L2(0.3, on="output")})
    plain = built().double()
    x = batch().double()
    model(x)
    for each, loss in (
        (model, model.reg_loss),
        (plain, 0.15 * plain.fc1(x).square().sum() / len(x)),
    ):
        first = torch.autograd.grad(loss, each.fc1.weight, create_graph=True)[0]
        first.square().sum().backward()
    torch.testing.assert_close(model.fc1.weight.grad, plain.fc1.weight.grad)


@every_term
@pytest.mark.parametrize("kind", ["zero", "one"])
def test_gradients_at_zero_are_finite(term: Any, kind: str) -> None:
    if isinstance(term, Penalty):
        pytest.skip("the user's own function")
    model = built()
    for p in model.parameters():
        nn.init.zeros_(p)
    if kind == "one":
        with torch.no_grad():
            model.fc1.weight[0, 0] = 1
    rw.regularize(model, term)
    model.reg_loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- functional_call, torch.func -------------------------------------------------------------


@every_term
def test_under_functional_call_the_given_tensors_count(term: Any) -> None:
    model, other = rw.regularize(built(WithLoss), term), rw.regularize(built(WithLoss, 1), term)
    if isinstance(term, L2SP):
        return
    given = params(other)
    torch.testing.assert_close(functional_call(model, given, (batch(),)), other(batch()))
    torch.testing.assert_close(model(batch()), rw.regularize(built(WithLoss), term)(batch()))


@every_term
def test_grad_vjp_and_jacrev_agree_with_backward(term: Any) -> None:
    model = rw.regularize(built(WithLoss), term)
    model(batch()).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return functional_call(model, given, (batch(),))

    given = params(model)
    for found in (grad(loss)(given), vjp(loss, given)[1](torch.ones(()))[0], jacrev(loss)(given)):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, inside jvp
@every_term
def test_forward_mode_gives_the_directional_derivative(term: Any) -> None:
    model = rw.regularize(built(WithLoss), term)
    if isinstance(term, L2SP):
        with torch.no_grad():
            model.fc1.weight.add_(1)

    def loss(given: dict[str, Tensor]) -> Tensor:
        return functional_call(model, given, (batch(),))

    given = params(model)
    along = {name: torch.ones_like(p) for name, p in given.items()}
    value, slope = jvp(loss, (given,), (along,))
    torch.testing.assert_close(value, model(batch()))
    wanted = sum(g.sum() for g in grad(loss)(given).values())
    # of 0.3 * a 0-dim tensor torch makes the tangent float64
    torch.testing.assert_close(slope, wanted, check_dtype=False)


@every_term
def test_vmap_over_stacked_models_gives_one_penalty_each(term: Any) -> None:
    models = [rw.regularize(built(WithLoss, seed), term) for seed in range(3)]
    stacked, buffers = stack_module_state(models)
    base = models[0]

    def loss(given: Any, held: Any) -> Tensor:
        return functional_call(base, (given, held), (batch(),))

    found = vmap(loss)(stacked, buffers)
    if isinstance(term, L2SP):  # the reference is that of the first
        reference = base
        wanted = torch.stack([functional_call(reference, params(m), (batch(),)) for m in models])
    else:
        wanted = torch.stack([m(batch()) for m in models])
    torch.testing.assert_close(found, wanted.detach())
    slopes = vmap(grad(loss))(stacked, buffers)
    assert all(slopes[name].shape == stacked[name].shape for name in stacked)


def test_output_penalties_inside_torch_func() -> None:
    model = rw.regularize(built(WithLoss), {"fc1": L2(0.3, on="output")})
    model(batch()).backward()
    wanted = model.fc1.weight.grad

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, given, (x,))

    found = grad(loss)(params(model), batch())
    torch.testing.assert_close(found["fc1.weight"], wanted)
    each = vmap(grad(loss), in_dims=(None, 0))(params(model), batch()[:, None])
    assert each["fc1.weight"].shape == (6, 5, 4)
    # what such a forward recorded is gone with it, and does no harm
    assert model.reg_loss == 0
    model(batch())
    assert model.reg_loss > 0


def test_vmap_with_called_weights_and_dropconnect() -> None:
    model = rw.regularize(built(WithLoss), {"": L2(0.3, when="called")})
    torch.testing.assert_close(
        functional_call(model, params(model), (batch(),)), model(batch()).detach()
    )
    model = rw.regularize(built(), DropConnect(0.5))
    given = {n: torch.stack([p, p]) for n, p in params(model).items()}

    def forward(values: Any) -> Tensor:
        return functional_call(model, values, (batch(),))

    a, b = vmap(forward, randomness="different")(given)
    assert not torch.equal(a, b)
    a, b = vmap(forward, randomness="same")(given)
    torch.testing.assert_close(a, b)


# ---- layouts ---------------------------------------------------------------------------------


@every_term
def test_memory_layout_does_not_matter(term: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1, bias=False))
    if isinstance(term, GroupLasso):
        term = GroupLasso(0.1, dim=1)
    wanted = rw.regularize(plain, term).reg_loss
    wanted.backward()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1, bias=False))
    model.to(memory_format=torch.channels_last)
    rw.regularize(model, term)
    torch.testing.assert_close(model.reg_loss, wanted)
    model.reg_loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


LAYOUTS = {
    "transposed": lambda w: w.t().contiguous().t(),
    "strided": lambda w: torch.stack([w, w], -1)[..., 0],
    "storage offset": lambda w: torch.cat([w, w])[len(w) :],
    "expanded": lambda w: w[:1].expand(len(w), -1),
}


@every_term
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_non_contiguous_weights(term: Any, layout: Any) -> None:
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    models = [nn.Linear(3, 4) for _ in range(2)]
    for model, value in zip(models, (layout(w), layout(w).contiguous()), strict=True):
        model.weight = nn.Parameter(value)
        rw.regularize(model, term)
        model.reg_loss.backward()
    torch.testing.assert_close(models[0].reg_loss, models[1].reg_loss)
    torch.testing.assert_close(models[0].weight.grad, models[1].weight.grad)


def test_empty_weights_cost_nothing() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 3))
    rw.regularize(model, (L1(1.0), L2(1.0), GroupLasso(1.0)))
    assert model.reg_loss == 0
    model.reg_loss.backward()


def test_a_sparse_gradient_becomes_dense_and_the_table_says_so() -> None:
    model = nn.Sequential(nn.Embedding(6, 3, sparse=True))
    rw.regularize(model, L2(0.5))
    assert "its sparse gradient becomes dense" in rw.policy(model).rows()[0]["note"]
    (model(torch.tensor([1, 4])).sum() + model.reg_loss).backward()
    found = model[0].weight.grad
    wanted = 0.5 * model[0].weight.detach()
    wanted[[1, 4]] += 1
    torch.testing.assert_close(found, wanted)


# ---- nothing, and what is not a number -------------------------------------------------------


def test_without_an_entry_the_penalty_is_a_zero_that_adds() -> None:
    for model in (rw.regularize(built(), {"fc1": None}), built()):
        loss = rw.reg_loss(model)
        assert (loss.item(), loss.shape, loss.dtype) == (0.0, (), torch.float32)
        assert rw.penalties(model) == {}
        (model(batch()).sum() + loss).backward()
    assert rw.reg_loss(nn.ReLU()) == 0
    assert rw.reg_loss(built().double()).dtype == torch.float64


def test_an_all_frozen_model_gives_a_zero_without_a_graph() -> None:
    model = rw.regularize(built(), L2(1.0)).requires_grad_(False)
    assert model.reg_loss == 0
    assert not model.reg_loss.requires_grad
    assert [value.item() for value in rw.penalties(model).values()] == [0.0, 0.0]


@every_term
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_shows_in_its_own_entry_and_nowhere_else(term: Any, bad: float) -> None:
    model, clean = rw.regularize(built(), term), rw.regularize(built(), term)
    with torch.no_grad():
        model.fc1.weight[1, 2] = bad
    found, wanted = rw.penalties(model), rw.penalties(clean)
    assert not found["fc1.weight"].isfinite()
    assert torch.equal(found["fc2.weight"], wanted["fc2.weight"])
    assert not model.reg_loss.isfinite()
    model.reg_loss.backward()
    clean.reg_loss.backward()
    assert model.fc2.weight.grad.isfinite().all()
    torch.testing.assert_close(model.fc2.weight.grad, clean.fc2.weight.grad)


@pytest.mark.parametrize("term", [L1(0.3), L2(0.2)])
def test_one_nan_leaves_the_gradients_of_its_neighbours(term: Any) -> None:
    model = rw.regularize(built(), term)
    with torch.no_grad():
        model.fc1.weight[1, 2] = math.nan
    model.reg_loss.backward()
    bad = torch.zeros(5, 4, dtype=torch.bool)
    bad[1, 2] = True
    assert model.fc1.weight.grad[~bad].isfinite().all()


def test_a_nan_in_one_group_leaves_the_other_groups() -> None:
    model = rw.regularize(built(), GroupLasso(0.1))
    with torch.no_grad():
        model.fc1.weight[1, 2] = math.nan
    model.reg_loss.backward()
    rows = [0, 2, 3, 4]
    assert model.fc1.weight.grad[rows].isfinite().all()
    assert model.fc1.weight.grad[1].isnan().any()


# ---- contexts --------------------------------------------------------------------------------


def test_without_grad_it_is_a_plain_number() -> None:
    model = rw.regularize(built(), TERMS)
    wanted = model.reg_loss.detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss = model.reg_loss
        assert not loss.requires_grad
        assert loss == wanted


def test_anomaly_mode_finds_nothing() -> None:
    model = rw.regularize(built(), TERMS)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        (model(batch()).sum() + model.reg_loss).backward()


def test_deterministic_algorithms() -> None:
    model = rw.regularize(built(), TERMS)
    torch.use_deterministic_algorithms(True)
    try:
        model.reg_loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_model_on_the_meta_device_gives_a_meta_number() -> None:
    with torch.device("meta"):
        model = Mlp()
    rw.regularize(model, (L1(0.1), L2(0.2), GroupLasso(0.1), Orthogonal(0.2)))
    assert model.reg_loss.is_meta
    model.to_empty(device="cpu")
    nn.init.ones_(model.fc1.weight)
    nn.init.zeros_(model.fc2.weight)
    assert model.reg_loss.device.type == "cpu"


@pytest.mark.parametrize("n", [10**7])
def test_a_sum_over_many_elements_is_right(n: int) -> None:
    w = torch.rand(n // 1000, 1000, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(w)
    rw.regularize(model, (L1(1.0), L2(2.0)))
    wanted = w.double().abs().sum() + w.double().square().sum()
    assert model.reg_loss.item() == pytest.approx(wanted.item(), rel=1e-6)


# ---- GPU -------------------------------------------------------------------------------------


@gpu
def test_on_a_gpu_the_value_and_gradient_are_those_of_the_cpu() -> None:
    models = [rw.regularize(built().to(device), TERMS) for device in ("cpu", "cuda")]
    for model in models:
        model.reg_loss.backward()
    assert models[1].reg_loss.is_cuda
    torch.testing.assert_close(models[1].reg_loss.cpu(), models[0].reg_loss)
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(
            theirs.grad.cpu() if theirs.grad is not None else None, ours.grad
        )


@gpu
def test_a_model_over_two_devices_adds_up() -> None:
    model = built()
    model.fc1.cuda()
    rw.regularize(model, L2(1.0))
    torch.testing.assert_close(model.reg_loss.cpu(), rw.regularize(built(), L2(1.0)).reg_loss)


@gpu
def test_graphed_callables_replay_the_penalty() -> None:
    model = rw.regularize(built(WithLoss).cuda(), (L1(0.1), L2(0.2)))
    plain = rw.regularize(built(WithLoss).cuda(), (L1(0.1), L2(0.2)))
    fast = torch.cuda.make_graphed_callables(model, (batch().cuda(),))
    torch.testing.assert_close(fast(batch().cuda()), plain(batch().cuda()))


@gpu
def test_no_read_waits_for_the_gpu() -> None:
    model = rw.regularize(built().cuda(), TERMS[:5])
    torch.cuda.set_sync_debug_mode("error")
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        model.reg_loss.backward()
