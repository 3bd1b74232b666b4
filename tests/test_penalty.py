"""`reg_loss` and `penalties`: the numbers, from the live tensors, wherever they are read."""

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

import regwrap as rw
from regwrap import L1, L2, L2SP, Dropout, GroupLasso, Orthogonal, Penalty

# what torch says of its own code when torch.compile or torch.func is loaded
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(x)).relu())


RULES = {"fc": L1(0.1) + L2(0.5), "head": L2(0.25, on="all")}


def by_hand(model: Any) -> Tensor:
    fc, head = model.fc.weight, model.head
    half = (head.weight.square().sum() + head.bias.square().sum()) / 2
    return 0.1 * fc.abs().sum() + 0.5 / 2 * fc.square().sum() + 0.25 * half


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return rw.regularize(Net(), RULES)


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, tensors, allow_unused=True))


# ---- the number ------------------------------------------------------------------------------


def test_values_and_gradients_by_hand(model: Any) -> None:
    assert torch.allclose(model.reg_loss, by_hand(model))
    parameters = list(model.parameters())
    for ours, wanted in zip(
        gradients(model.reg_loss, *parameters), gradients(by_hand(model), *parameters), strict=True
    ):
        assert (ours is None) == (wanted is None)
        assert ours is None or torch.allclose(ours, wanted)  # type: ignore[arg-type]


def test_it_is_0_dim_the_function_s_and_the_same_in_train_and_eval(model: Any) -> None:
    assert model.reg_loss.shape == ()
    assert model.reg_loss.requires_grad
    assert torch.equal(model.reg_loss, rw.reg_loss(model))
    assert torch.equal(model.eval().reg_loss, model.train().reg_loss)
    with torch.no_grad():
        assert not model.reg_loss.requires_grad


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
)
def test_dtype_is_float32_or_wider(dtype: torch.dtype, wanted: torch.dtype) -> None:
    layer = nn.Linear(3, 3, dtype=dtype)
    terms = L1(0.1) + L2(0.1) + Orthogonal(0.1) + GroupLasso(0.1) + L2SP(0.1)
    model = rw.regularize(nn.Sequential(layer, nn.Linear(3, 3).to(dtype)), {"0": terms})
    assert model.reg_loss.dtype == wanted
    assert all(value.dtype == wanted for value in rw.penalties(model).values())
    model.reg_loss.backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == dtype
    assert rw.reg_loss(model[1]).dtype == wanted  # where nothing acts


def test_half_precision_does_not_overflow() -> None:
    model = rw.regularize(nn.Linear(300, 300).half(), {"": L1(1.0) + L2(1.0)})
    nn.init.constant_(model.weight, 300.0)
    assert model.reg_loss.item() == pytest.approx(300 * 9e4 + 9e4 / 2 * 9e4)


def test_zero_where_nothing_acts() -> None:
    for model in (
        nn.Linear(2, 2),
        nn.Linear(2, 2, dtype=torch.float64),
        nn.Linear(2, 2, device="meta"),
        nn.ReLU(),
        rw.regularize(Net(), {"fc": Dropout(0.5)}),
        rw.regularize(Net(), {"": None}),
        rw.regularize(Net(), {"fc": L2(1.0)}).requires_grad_(False),
    ):
        value = rw.reg_loss(model)
        parameter = next(model.parameters(), torch.zeros(()))
        assert value.shape == () and value.device == parameter.device
        assert value.is_meta or value == 0
        assert value.dtype == parameter.dtype
        (value + torch.ones((), device=value.device, requires_grad=True)).backward()


def test_it_follows_the_parameters_to_another_device(model: Any) -> None:
    model.to("meta")
    assert model.reg_loss.is_meta
    assert all(value.is_meta for value in rw.penalties(model).values())


def test_penalties_name_every_site_and_sum_to_reg_loss(model: Any) -> None:
    found = rw.penalties(model)
    assert list(found) == ["fc.weight", "head.weight", "head.bias"]
    assert torch.allclose(sum(found.values()), model.reg_loss)  # type: ignore[arg-type]
    assert torch.allclose(found["head.bias"], 0.125 * model.head.bias.square().sum())
    root = rw.regularize(nn.Linear(2, 2), L2(0.1))
    assert list(rw.penalties(root)) == ["weight"]
    assert rw.penalties(nn.Linear(2, 2)) == {}


def test_a_nan_or_infinity_stays_in_its_own_site(model: Any) -> None:
    with torch.no_grad():
        model.fc.weight[0, 0] = math.nan
        model.head.bias[0] = math.inf
    found = rw.penalties(model)
    assert found["fc.weight"].isnan() and found["head.bias"].isinf()
    assert torch.allclose(found["head.weight"], 0.125 * model.head.weight.square().sum())
    assert model.reg_loss.isnan()
    for name, grad in zip(
        "wb", gradients(model.reg_loss, model.head.weight, model.head.bias), strict=True
    ):
        assert grad is not None and grad.isfinite().all() == (name == "w")
    (grad,) = gradients(model.reg_loss, model.fc.weight)
    assert grad is not None and grad.isnan().sum() == 1


@pytest.mark.slow
@pytest.mark.parametrize("term", [L1(1.0), L2(1.0)], ids=str)
def test_float32_sums_are_right_to_1e6_at_1e8_elements(term: Any) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(
        torch.rand(10_000, 10_000, generator=torch.Generator().manual_seed(0))
    )
    exact = 0.0
    for rows in model.weight.detach().split(1000):
        wide = rows.double()
        exact += (wide.sum() if isinstance(term, L1) else wide.square().sum() / 2).item()
    with torch.no_grad():
        assert rw.reg_loss(rw.regularize(model, term)).item() == pytest.approx(exact, rel=1e-6)
        assert rw.penalties(model)["weight"].item() == pytest.approx(exact, rel=1e-6)


# ---- always from the live tensors ------------------------------------------------------------


def test_after_a_step_a_load_a_cast_and_a_replacement(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.ones(2, 4)).sum() + model.reg_loss).backward()
        optimizer.step()
        assert torch.allclose(model.reg_loss, by_hand(model))
    for assign in (False, True):
        model.load_state_dict(Net().state_dict(), assign=assign)
        assert torch.allclose(model.reg_loss, by_hand(model))
    model.to(torch.float64)
    assert model.reg_loss.dtype == torch.float64
    assert torch.allclose(model.reg_loss, by_hand(model))
    model.fc.weight = nn.Parameter(torch.ones(6, 4))
    assert torch.allclose(rw.reg_loss(model.fc), torch.tensor(0.1 * 24 + 0.25 * 24))
    model.fc.weight.data = torch.zeros(6, 4)
    assert rw.reg_loss(model.fc) == 0


def test_an_averaged_copy_has_its_own(model: Any) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        model.fc.weight.zero_()
    average.update_parameters(model)
    assert torch.allclose(rw.reg_loss(average), by_hand(average.module))
    assert rw.reg_loss(average) != model.reg_loss


def test_freezing_and_unfreezing(model: Any) -> None:
    whole = model.reg_loss.item()
    model.fc.requires_grad_(False)
    assert model.reg_loss.item() == pytest.approx(rw.reg_loss(model.head).item())
    assert rw.penalties(model)["fc.weight"] == 0
    assert model.reg_loss.requires_grad
    model.requires_grad_(False)
    assert model.reg_loss == 0
    model.requires_grad_(True)
    assert model.reg_loss.item() == whole


def test_parts(model: Any) -> None:
    assert torch.allclose(rw.reg_loss(model.fc) + rw.reg_loss(model.head), model.reg_loss)
    assert rw.reg_loss(model.norm) == 0
    assert list(rw.penalties(model.head)) == ["weight", "bias"]
    outer = nn.Sequential(model, nn.Linear(3, 3))
    assert torch.equal(rw.reg_loss(outer), model.reg_loss)
    assert not hasattr(outer, "reg_loss")
    head = copy.deepcopy(model.head)
    assert torch.equal(rw.reg_loss(head), rw.reg_loss(model.head))


def test_tied_before_counts_once_and_twice_when_untied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    rw.regularize(model, L2(1.0))
    one = model[0].weight.square().sum() / 2
    assert torch.allclose(model.reg_loss, one)
    assert list(rw.penalties(model)) == ["0.weight"]
    assert torch.allclose(rw.reg_loss(model[1]), one)
    model[1].weight = nn.Parameter(torch.ones(3, 3))
    assert torch.allclose(model.reg_loss, one + 4.5)
    assert list(rw.penalties(model)) == ["0.weight", "1.weight"]


def test_tied_afterwards_counts_once_by_the_later_rule() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    rw.regularize(model, {"1": L2(1.0) + L1(1.0), "0": L2(10.0)})
    model[1].weight = model[0].weight
    weight = model[0].weight
    wanted = 5 * weight.square().sum() + weight.abs().sum()
    assert torch.allclose(model.reg_loss, wanted)
    assert torch.allclose(rw.penalties(model)["0.weight"], wanted)


# ---- side effects ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_reading_runs_no_power_iteration_and_draws_nothing(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = rw.regularize(nn.Sequential(make(nn.Linear(5, 5))), L2(0.1)).train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    loss = model.reg_loss + sum(rw.penalties(model).values())  # type: ignore[operator]
    loss.backward()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    model.eval()(torch.ones(1, 5))
    assert torch.allclose(model.reg_loss, 0.05 * model[0].weight.square().sum())


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]


def test_reading_keeps_no_memory_and_leaves_the_record_alone(model: Any) -> None:
    model.reg_loss.backward()
    record = pickle.dumps(model)
    before = {id(tensor): weakref.ref(tensor) for tensor in live_tensors()}
    kept = [weakref.ref(value) for value in (model.reg_loss, *rw.penalties(model).values())]
    assert not [t for t in live_tensors() if id(t) not in before or before[id(t)]() is not t]
    assert not any(ref() is not None for ref in kept)
    assert len(pickle.dumps(model)) == len(record)


def test_a_copy_between_reading_and_backward(model: Any) -> None:
    loss = model.reg_loss
    copy.deepcopy(model)
    loss.backward()
    assert model.fc.weight.grad is not None


# ---- replaced modules ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda m: m, copy.deepcopy], ids=["itself", "a copy"])
def test_replaced_modules_are_noticed_once(model: Any, make: Any) -> None:
    model = make(model)
    model.head = nn.Linear(6, 2)
    with pytest.warns(rw.RegwrapWarning, match="of Net .* replaced"):
        assert torch.equal(model.reg_loss, rw.reg_loss(model.fc))
    assert model.reg_loss > 0  # warnings are errors


def test_what_is_undone_moved_or_pruned_by_the_user_is_not_missed(model: Any) -> None:
    for each in (model, copy.deepcopy(model)):
        rw.unregularize(each.head)
        assert torch.equal(each.reg_loss, rw.reg_loss(each.fc))
    rw.regularize(model, {"head": L2(0.1)})
    model.moved, _ = nn.Sequential(model.head), model.reg_loss
    del model.head
    assert model.reg_loss > rw.reg_loss(model.fc)


# ---- wrappers --------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp(model: Any) -> None:
    twin = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = torch.ones(2, 4)
    (wrapped(x).sum() + rw.reg_loss(wrapped)).backward()
    (twin(x).sum() + by_hand(twin)).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad)
    assert rw.penalties(wrapped).keys() == rw.penalties(model).keys()
    assert len(rw.policy(wrapped)) == len(rw.policy(model))
    assert type(rw.unregularize(wrapped).module) is Net


def test_compile_and_data_parallel(model: Any) -> None:
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert torch.equal(rw.reg_loss(wrapped), model.reg_loss)
        assert list(rw.penalties(wrapped)) == list(rw.penalties(model))
    assert torch.equal(torch.compile(model).reg_loss, model.reg_loss)


class InForward(Net):
    """Reads its own penalty within its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean() + self.reg_loss  # type: ignore[attr-defined]


@pytest.fixture
def reading() -> Any:
    torch.manual_seed(0)
    return rw.regularize(InForward(), RULES)


def test_read_within_a_compiled_forward(reading: Any) -> None:
    x = torch.ones(2, 4)
    compiled = torch.compile(reading, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.allclose(compiled(x), reading(x))
        compiled(x).backward()
        with torch.no_grad():
            reading.fc.weight.mul_(2)
    twin = copy.deepcopy(reading)
    twin.zero_grad()
    reading.zero_grad()
    compiled(x).backward()
    twin(x).backward()
    assert torch.allclose(reading.fc.weight.grad, twin.fc.weight.grad)


TERMS = [L1(0.1), L2(0.1), GroupLasso(0.1), Orthogonal(0.1), L2SP(0.1), Penalty(torch.sum, 0.1)]


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_a_compiled_training_step_has_one_graph(term: Any) -> None:
    model = rw.regularize(Net(), {"": term + Dropout(0.0)})

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(x: Tensor) -> Tensor:
        return model(x).sum() + rw.reg_loss(model)

    x = torch.ones(2, 4)
    assert torch.allclose(loss_of(x), model(x).sum() + model.reg_loss)


# ---- torch.func ------------------------------------------------------------------------------


def test_functional_call_reads_what_is_substituted(reading: Any) -> None:
    x = torch.ones(2, 4)
    own = {name: p.detach() for name, p in reading.named_parameters()}
    doubled = {name: 2 * p for name, p in own.items()}
    other = copy.deepcopy(reading)
    other.load_state_dict(doubled)
    assert torch.allclose(functional_call(reading, doubled, x), other(x))
    assert torch.allclose(functional_call(reading, own, x), reading(x))


def test_grad_jacobian_and_hessian(reading: Any) -> None:
    x = torch.ones(2, 4)
    own = {name: p.detach() for name, p in reading.named_parameters()}
    found = torch.func.grad(lambda ps: functional_call(reading, ps, x))(own)
    reading(x).backward()
    for name, parameter in reading.named_parameters():
        assert torch.allclose(found[name], parameter.grad), name
    bias = {"head.bias": own.pop("head.bias")}
    hessian = torch.func.hessian(lambda b: functional_call(reading, own | b, x))(bias)
    wanted = 2 / 6 * 2 * torch.eye(3) + 0.25 * torch.eye(3)  # of the mean of squares, and of L2
    assert torch.allclose(hessian["head.bias"]["head.bias"], wanted, atol=1e-6)


def test_vmap_over_stacked_parameters() -> None:
    models = [rw.regularize(InForward(), RULES) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    parameters = {name: p.detach() for name, p in parameters.items()}
    x = torch.ones(2, 4)
    base = models[0]

    def loss_of(state: Any) -> Tensor:
        return functional_call(base, state, x)  # type: ignore[no-any-return]

    found = torch.vmap(loss_of)(parameters | buffers)
    assert torch.allclose(found, torch.stack([model(x) for model in models]))
    slopes = torch.vmap(torch.func.grad(loss_of))(parameters)
    for i, each in enumerate(models):
        each(x).backward()
        assert torch.allclose(slopes["fc.weight"][i], each.fc.weight.grad, atol=1e-6)


def test_double_backward(model: Any) -> None:
    (grad,) = torch.autograd.grad(model.reg_loss, [model.fc.weight], create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), [model.fc.weight])
    assert torch.allclose(second, torch.full((6, 4), 0.5))


# ---- a model's own reg_loss ------------------------------------------------------------------


class Method(Net):
    def reg_loss(self) -> str:
        return "mine"


class Property(Net):
    @property
    def reg_loss(self) -> str:
        return "mine"


class Attribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.reg_loss = "mine"


class Buffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reg_loss", torch.tensor(7.0))


@pytest.mark.parametrize("cls", [Method, Property, Attribute, Buffer])
def test_a_model_with_a_reg_loss_of_its_own_keeps_it(cls: Any) -> None:
    def own(model: Any) -> Any:
        value = model.reg_loss
        return value() if callable(value) else value

    with pytest.warns(rw.RegwrapWarning, match=r"regwrap\.reg_loss\(model\)"):
        model = rw.regularize(cls(), RULES)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert own(each) == own(cls())
        assert torch.allclose(rw.reg_loss(each), by_hand(each))
        assert len(rw.policy(each)) == 4
    assert own(rw.unregularize(model)) == own(cls())
