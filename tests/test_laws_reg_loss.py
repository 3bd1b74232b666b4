"""The numbers: `reg_loss` is the formula over the weights as they are now, on every model."""

import copy
from typing import Any

import pytest
import torch
from laws import PENALTIES, every_case, put_on, regularized, rules_of, told
from support import gradients, named_parameters, run
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from zoo import BY_NAME, Case, Mlp

import regwrap as rw
from regwrap import L1, L2

S2, S1 = (term.strength for term in PENALTIES)

# ---- the formula, written again, in float64 --------------------------------------------------


def by_hand(case: Case, model: nn.Module) -> Tensor:
    """L2(on="all") and L1 on the weights proper, site by site, each tensor once."""
    total = torch.zeros((), dtype=torch.float64)
    for name, tensor in penalised(case, model).items():
        wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
        total = total + S2 / 2 * (wide.abs() ** 2).sum()
        if tensor.dim() >= 2 and name not in getattr(type(model), "MARKED", ()):
            total = total + S1 * wide.abs().sum()
    return total


def penalised(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """What counts, by its first name: trainable parameters, and what is computed from them."""
    found, seen = {}, set()
    computed = effective_weights(model)
    machinery = tuple(prefix for prefix, _ in computed.values())
    left_out = ("0.",) if case.name in ("script_child", "compiled_child") else ()
    for name, parameter in named_parameters(model):
        own = id(parameter) not in seen and parameter.requires_grad and not is_lazy(parameter)
        if own and not name.startswith((*machinery, *left_out)):
            found[name] = parameter
        seen.add(id(parameter))
    return found | {name: weight for name, (_, weight) in computed.items()}


def effective_weights(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Weights that torch computes: the start of the names of what from, and what of."""
    found = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        # Not by hasattr, which a model may answer as it likes; a ScriptModule's need keys().
        children = {*module._modules.keys()}
        held = {*module._parameters.keys(), *module._buffers.keys()}
        if "parametrizations" in children:
            modes = [(m, m.training) for m in module.modules()]
            module.eval()  # in training a spectral norm would move on
            found[f"{prefix}weight"] = (f"{prefix}parametrizations.", module.weight)
            for m, training in modes:
                m.training = training
        if "weight_g" in held:
            g, v = module.weight_g, module.weight_v
            found[f"{prefix}weight"] = (f"{prefix}weight_", g * v / v.norm(dim=1, keepdim=True))
        if "weight_mask" in held:
            weight = module.weight_orig * module.weight_mask
            found[f"{prefix}weight"] = (f"{prefix}weight_", weight)
        elif "weight_u" in held:
            w = module.weight_orig
            found[f"{prefix}weight"] = (
                f"{prefix}weight_",
                w / torch.dot(module.weight_u, w @ module.weight_v),
            )
    return found


def check(case: Case, model: nn.Module) -> None:
    """The value and the gradient of every parameter are those of the formula."""
    parameters = [p for _, p in named_parameters(model) if p.requires_grad and not is_lazy(p)]
    ours, theirs = rw.reg_loss(model), by_hand(case, model)
    wide = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
    assert ours.shape == ()
    assert ours.dtype == (torch.float64 if wide else torch.float32)
    if ours.is_meta:
        return
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-9)
    assert ours.requires_grad == theirs.requires_grad
    if ours.requires_grad:
        left, right = (
            torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            for value in (ours, theirs)
        )
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if a.itemsize == 2 else 1e-5, atol=1e-7)


@every_case
def test_reg_loss_is_the_formula(case: Case) -> None:
    model = regularized(case)
    check(case, model)
    with told():
        run(model, case, train=True)
    if case.name == "late_layers":  # the rules came before the layers and reached nothing
        assert rw.reg_loss(model) == 0
        put_on(model, rules_of(case))
    check(case, model)
    check(case, model.eval())


@every_case
def test_penalties_sum_to_reg_loss(case: Case) -> None:
    model = regularized(case)
    found = rw.penalties(model)
    whole = rw.reg_loss(model).double()
    if not whole.is_meta:
        torch.testing.assert_close(sum(found.values(), torch.zeros(())).double(), whole)
    trainable = {name for name, value in found.items() if value.requires_grad}
    lazy = {name for name, p in named_parameters(model) if is_lazy(p)}
    assert trainable == set(penalised(case, model)) - lazy


@every_case
def test_the_attribute_is_the_function(case: Case) -> None:
    model = regularized(case)
    if case.name in ("names_like_ours", "child_named_like_ours"):
        assert rw.penalty.RegularizedMixin not in type(model).__mro__
    elif not rw.reg_loss(model).is_meta:
        assert torch.equal(model.reg_loss, rw.reg_loss(model))


def test_a_name_that_the_model_assigns_is_the_models() -> None:
    case = BY_NAME["assigns_reg_loss"]
    plain, model = case.build(), rw.regularize(case.build(), L2(1e-3))
    assert torch.equal(model.reg_loss, rw.reg_loss(model))
    run(plain, case)
    with pytest.warns(rw.RegwrapWarning, match="has a reg_loss of its own"):
        run(model, case)
    run(model, case)  # told once
    assert torch.equal(model.reg_loss, plain.reg_loss)
    assert torch.equal(copy.deepcopy(model).reg_loss, plain.reg_loss)
    halves = sum(w.square().sum() for w in model.parameters() if w.dim() > 1)
    torch.testing.assert_close(rw.reg_loss(model), 5e-4 * halves)


@every_case
def test_reg_loss_reads_the_live_weights(case: Case) -> None:
    """After steps of an optimizer, another dtype, other values, with other things frozen."""
    model = regularized(case)
    with told():
        run(model, case, train=False)
    if case.name == "late_layers":
        put_on(model, rules_of(case))
    for change in (step, scale, load_assigned, freeze_one, unfreeze, to_float64):
        if change(model, case) is not False:
            check(case, model)


def step(model: nn.Module, case: Case) -> None:
    parameters = [p for _, p in named_parameters(model) if p.requires_grad]
    if parameters:
        optimizer = torch.optim.SGD(list(dict.fromkeys(parameters)), lr=0.1)
        rw.reg_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def scale(model: nn.Module, case: Case) -> None:
    with torch.no_grad():
        for parameter in floats(model):
            parameter.mul_(1.25)


def load_assigned(model: nn.Module, case: Case) -> bool | None:
    """Other parameter objects, by `load_state_dict(assign=True)`."""
    if case.name in ("script_child", "state_dict_override", "shared_storage"):
        return False  # torch or the model itself refuses `assign`
    frozen = {name for name, p in named_parameters(model) if not p.requires_grad}
    state = {
        key: value * 1.1 if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    for name, parameter in named_parameters(model):
        parameter.requires_grad_(name not in frozen)
    return None


def freeze_one(model: nn.Module, case: Case) -> None:
    for parameter in floats(model)[:1]:
        parameter.requires_grad_(False)


def unfreeze(model: nn.Module, case: Case) -> None:
    for parameter in floats(model):
        parameter.requires_grad_(True)


def to_float64(model: nn.Module, case: Case) -> bool | None:
    if any(p.is_complex() for _, p in named_parameters(model)):
        return False  # would lose the imaginary part
    model.to(torch.float64)
    return None


def floats(model: nn.Module) -> list[nn.Parameter]:
    named = named_parameters(model)
    return list(dict.fromkeys(p for _, p in named if p.is_floating_point() or p.is_complex()))


# ---- what training code does to weights ------------------------------------------------------


@pytest.fixture
def mlp() -> nn.Module:
    return regularized(BY_NAME["mlp"])


def test_a_replaced_parameter_counts(mlp: nn.Module) -> None:
    mlp.fc1.weight = nn.Parameter(torch.ones(3, 3))
    mlp.fc2.weight = nn.Parameter(torch.zeros(4, 8))
    check(BY_NAME["mlp"], mlp)


def test_an_average_of_weights_has_its_own_penalty(mlp: nn.Module) -> None:
    average = AveragedModel(mlp)
    before = rw.reg_loss(average.module)
    scale(mlp, BY_NAME["mlp"])
    assert torch.equal(rw.reg_loss(average.module), before)
    for _ in range(3):
        average.update_parameters(mlp)
    check(BY_NAME["mlp"], average.module)
    assert not torch.equal(average.module.reg_loss, before)
    assert torch.equal(rw.reg_loss(average), average.module.reg_loss)


def test_a_part_has_its_own_share(mlp: nn.Module) -> None:
    parts = [rw.reg_loss(part) for part in (mlp.fc1, mlp.fc2)]
    torch.testing.assert_close(sum(parts), mlp.reg_loss)


def test_unfreezing_brings_the_penalty_back(mlp: nn.Module) -> None:
    whole = mlp.reg_loss
    mlp.requires_grad_(False)
    assert not mlp.reg_loss.requires_grad
    assert mlp.reg_loss == 0
    mlp.requires_grad_(True)
    assert torch.equal(mlp.reg_loss, whole)


class ReadsInside(Mlp):
    """A model that adds its own penalty in forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum() + rw.reg_loss(self)


def test_functional_call_substitutes_what_reg_loss_reads_inside() -> None:
    model = rw.regularize(ReadsInside(), {"": [L2(1.0, on="all"), L1(0.5)]})
    zeros = {n: torch.zeros_like(p, requires_grad=True) for n, p in model.named_parameters()}
    twos = {n: torch.full_like(p, 2.0, requires_grad=True) for n, p in zeros.items()}
    outside = model.reg_loss
    assert torch.func.functional_call(model, zeros, torch.zeros(1, 6)) == 0
    plain = torch.func.functional_call(ReadsInside(), twos, torch.zeros(1, 6))
    value = torch.func.functional_call(model, twos, torch.zeros(1, 6))
    weights, elements = 6 * 8 + 8 * 4, 6 * 8 + 8 + 8 * 4 + 4
    torch.testing.assert_close(value - plain, torch.tensor(2.0 * elements + 1.0 * weights))
    (grad,) = torch.autograd.grad(value - plain, [twos["fc1.weight"]])
    torch.testing.assert_close(grad, torch.full((8, 6), 2.5))
    assert torch.equal(model.reg_loss, outside)


def test_vmapped_ensembles_have_a_penalty_each() -> None:
    models = [rw.regularize(ReadsInside(), L2(1.0)) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def penalty(weights: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(base, weights, torch.zeros(1, 6))

    found = torch.vmap(penalty)(parameters)
    torch.testing.assert_close(found, torch.stack([m(torch.zeros(1, 6)) for m in models]))


def test_gradients_of_loss_and_penalty_add_up(mlp: nn.Module) -> None:
    case = BY_NAME["mlp"]
    data = gradients(mlp, case, train=False)
    mlp.reg_loss.backward()
    both = {name: p.grad for name, p in mlp.named_parameters()}
    assert data.keys() == both.keys()
    for name, parameter in mlp.named_parameters():
        wanted = S2 * parameter + (S1 * parameter.sign() if parameter.dim() > 1 else 0)
        torch.testing.assert_close(both[name], wanted.detach())
