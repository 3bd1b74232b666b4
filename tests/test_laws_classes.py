"""Beneath foreign classes, beside the user's hooks, and with what is compiled already."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import support
import torch
import torch.distributed as dist
from laws import RULES, hooked, put_on, regularized, told
from support import differences, fingerprint, run, same_outputs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations, parametrize
from zoo import BY_NAME, Mlp

import regwrap as rw
from regwrap import L1, L2, Dropout, RegwrapWarning
from regwrap.penalty import RegularizedMixin

# ---- parametrized roots ----------------------------------------------------------------------


def test_a_root_is_parametrized_first_and_plain_again_after_undo() -> None:
    model = parametrizations.weight_norm(nn.Linear(6, 4))
    before = fingerprint(model)
    rw.regularize(model, RULES)
    assert type(model).__name__ == "ParametrizedLinear"
    # ours lies beneath, so that torch finds its own class on top, where it put it
    assert [c.__name__ for c in type(model).__mro__][:3] == [
        "ParametrizedLinear",
        "Linear",
        "RegularizedMixin",
    ]
    assert model.reg_loss.requires_grad
    rw.unregularize(model)
    assert differences(before, fingerprint(model)) == []


def test_a_parametrization_taken_off_leaves_the_policy() -> None:
    model = rw.regularize(parametrizations.weight_norm(nn.Linear(6, 4)), RULES)
    value = model.reg_loss
    parametrize.remove_parametrizations(model, "weight")
    torch.testing.assert_close(model.reg_loss, value)
    rw.unregularize(model)
    assert type(model) is nn.Linear


def test_a_root_parametrized_after_us_can_be_undone_in_either_order() -> None:
    for first in (rw.unregularize, lambda m: parametrize.remove_parametrizations(m, "weight")):
        model = rw.regularize(nn.Linear(6, 4), L2(1e-3))
        parametrizations.orthogonal(model)
        assert model.reg_loss.requires_grad
        first(model)
        assert hasattr(model, "reg_loss") == (first is not rw.unregularize)
        if first is rw.unregularize:
            assert RegularizedMixin not in type(model).__mro__
            parametrize.remove_parametrizations(model, "weight")
        else:
            rw.unregularize(model)
        assert type(model) is nn.Linear


def test_undo_of_a_parametrized_copy_leaves_the_original() -> None:
    model = rw.regularize(parametrizations.weight_norm(nn.Linear(6, 4)), RULES)
    other = copy.deepcopy(model)
    rw.unregularize(other)
    assert not hasattr(other, "reg_loss")
    assert model.reg_loss.requires_grad
    assert hooked(model)
    assert not hooked(other)


# ---- GraphModule roots -----------------------------------------------------------------------


def test_a_graph_module_keeps_its_policy_through_copies_and_recompilation() -> None:
    case = BY_NAME["graph_module_root"]
    model = case.build()
    before = fingerprint(model)
    put_on(model, RULES)
    value = model.reg_loss
    model.recompile()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, torch.fx.GraphModule)
        assert rw.policy(other) == rw.policy(model)
        assert torch.equal(other.reg_loss, value)
        assert same_outputs(run(other, case, train=True), run(model, case, train=True))
        rw.unregularize(other)
        assert not hasattr(other, "reg_loss")
        assert torch.equal(model.reg_loss, value)
    rw.unregularize(model)
    left, right = before["modules"].pop(""), (after := fingerprint(model))["modules"].pop("")
    assert left["mro"] == right["mro"]
    assert [name for name, _ in left["attributes"]] == [name for name, _ in right["attributes"]]
    assert differences(before["state_dict"], after["state_dict"]) == []


# ---- fully_shard roots -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


SHARDED_RULES = {"": [L2(1e-3, on="all"), L1(1e-4)]}


@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_sharded_root_is_regularized_trains_and_is_undone(mesh: Any, sharded_first: bool) -> None:
    torch.manual_seed(0)
    model = Mlp()
    twin = rw.regularize(copy.deepcopy(model), SHARDED_RULES)
    if sharded_first:
        fully_shard(model, mesh=mesh)
        before = type(model).__mro__
        rw.regularize(model, SHARDED_RULES)
    else:
        rw.regularize(model, SHARDED_RULES)
        fully_shard(model, mesh=mesh)
    assert type(model).__name__ == "FSDPMlp"
    assert isinstance(model, FSDPModule)
    x = torch.randn(3, 6)
    for each in (model, twin):
        assert type(each.reg_loss) is Tensor
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (each(x).square().sum() + each.reg_loss).backward()
            optimizer.step()
    torch.testing.assert_close(model.reg_loss, twin.reg_loss)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs)
    rw.unregularize(model)
    assert RegularizedMixin not in type(model).__mro__
    assert isinstance(model, FSDPModule)
    if sharded_first:
        assert type(model).__mro__[1:] == before[1:]  # FSDPMlp itself was made anew
        assert vars(type(model)).keys() == vars(before[0]).keys()
    model(x).sum().backward()


def test_dropout_acts_beneath_a_sharded_root(mesh: Any) -> None:
    torch.manual_seed(0)
    model = fully_shard(Mlp(), mesh=mesh)
    rw.regularize(model, {nn.Linear: Dropout(0.9)})
    x = torch.randn(3, 6)
    assert torch.equal(model.eval()(x), model.eval()(x))
    assert not torch.equal(model.train()(x), model.train()(x))
    rw.unregularize(model)
    assert torch.equal(model.train()(x), model.eval()(x))


# ---- hooks -----------------------------------------------------------------------------------


def test_our_hook_has_a_key_that_no_counter_gives_out() -> None:
    layer = regularized(BY_NAME["root_linear"])
    assert list(layer._forward_hooks) == ["regwrap"]
    handle = layer.register_forward_hook(lambda m, args, out: None)
    assert next(iter(layer._forward_hooks)) == "regwrap"
    handle.remove()
    assert list(layer._forward_hooks) == ["regwrap"]


def test_hooks_of_the_user_run_before_and_after_ours() -> None:
    """Before: those that were there. After: those that came later, which see what was dropped."""
    seen: list[Tensor] = []
    layer = nn.Linear(6, 1000)
    layer.register_forward_hook(lambda m, args, out: seen.append(out))
    rw.regularize(layer, Dropout(0.5))
    layer.register_forward_hook(lambda m, args, out: seen.append(out))
    layer(torch.randn(1, 6))
    assert not (seen[0] == 0).any()
    assert 400 < (seen[1] == 0).sum() < 600


# ---- torch.compile ---------------------------------------------------------------------------

COMPILED = [
    *("mlp", "tied_weights", "shared_module", "called_twice", "root_sequential", "dict_output"),
    *("transformer_encoder", "weight_norm_root", "graph_module_root", "own_dropout"),
    *("batch_norm", "user_forward_hooks", "linear_subclass", "assigns_reg_loss"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_model_compiled_and_called_first_does_drop_afterwards(name: str) -> None:
    """Dynamo does not look at hooks: without a reset the compiled code would go on without."""
    case = BY_NAME[name]
    model = case.build()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with told():
        plain = {train: run(compiled, case, train=train) for train in (True, False)}
        assert rw.regularize(compiled, RULES) is compiled
        for train in (True, False):
            model.train(train)
            args, kwargs = case.inputs()
            torch.manual_seed(1)
            output = compiled(*args, **kwargs)
            assert support.close_outputs(output, run(model, case, train=train))
            if name not in ("own_dropout", "graph_module_root", "batch_norm"):  # moves by itself
                assert support.close_outputs(output, plain[train]) == (not train)
        rw.unregularize(compiled)
        assert support.close_outputs(run(compiled, case, train=True), run(model, case, train=True))


def test_what_is_compiled_elsewhere_is_reset_with_a_warning_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rw.surgery, "_warned", False)
    torch.compiler.reset()
    case = BY_NAME["root_sequential"]  # by a hook: a rewrite is a change of class, which is seen
    other = torch.compile(case.build(), backend="eager")
    run(other, case)
    model = case.build()
    with pytest.warns(RegwrapWarning, match=r"torch\.compiler\.reset\(\) was called"):
        rw.regularize(model, {nn.Linear: Dropout(0.9)})
    compiled = torch.compile(model, backend="eager")
    assert not torch.equal(run(compiled, case, seed=1), run(compiled, case, seed=2))
    run(other, case)
    rw.unregularize(model)  # warns no second time
    assert torch.equal(run(compiled, case, seed=1), run(compiled, case, seed=2))


def test_a_dropout_that_changes_no_class_acts_in_what_is_compiled() -> None:
    """The root has its class from the penalty: nothing that dynamo looks at changes any more."""
    torch.compiler.reset()
    case = BY_NAME["mlp"]
    model = rw.regularize(case.build(), L2(1e-3))
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with told():
            assert torch.equal(run(compiled, case, seed=1), run(compiled, case, seed=2))
            rw.regularize(model, Dropout(0.9))
            assert not torch.equal(run(compiled, case, seed=1), run(compiled, case, seed=2))
            rw.regularize(model, {"": None})


def test_penalties_alone_leave_what_is_compiled_alone() -> None:
    torch.compiler.reset()
    case = BY_NAME["mlp"]
    model = case.build()
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    run(compiled, case)
    rw.regularize(compiled, L2(1e-3))
    torch.testing.assert_close(compiled.reg_loss, model.reg_loss)
    assert len(compilations) == 1


@pytest.mark.slow
def test_reg_loss_compiles_inside_a_training_step() -> None:
    case = BY_NAME["mlp"]
    model = regularized(case).eval()
    torch.compiler.reset()

    def loss(x: Tensor) -> Tensor:
        return model(x).sum() + rw.reg_loss(model)

    (x,), _ = case.inputs()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))


@pytest.mark.slow
def test_inductor_compiles_a_regularized_model() -> None:
    case = BY_NAME["mlp"]
    model = regularized(case)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    warnings.simplefilter("ignore", DeprecationWarning)  # inductor's own
    assert support.close_outputs(run(compiled, case, train=False), run(model, case, train=False))
    out = run(compiled, case, train=True)
    support.backward(out)
    assert all(p.grad is not None for p in model.parameters())
    zeros = sum(int((run(compiled, case, train=True, seed=s) == 0).sum()) for s in range(40))
    assert 0.3 < zeros / (40 * out.numel()) < 0.7
