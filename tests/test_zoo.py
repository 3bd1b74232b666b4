"""The zoo itself: every plain model works, has the hazard it is named for, and passes what is said.

A check that failed on a plain model for no good reason would silence the law that uses it, so what
plain models fail is pinned here, and each check is shown to bite.
"""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import support
import torch
from support import CHECKS, differences, fingerprint, flat_tensors, gradients, run, same_outputs
from torch import Tensor, nn
from zoo import BY_NAME, ZOO, Case, Mlp, OwnDropout

every_case = pytest.mark.parametrize("case", ZOO, ids=str)


def test_the_zoo_is_large_and_every_hazard_is_told_once() -> None:
    assert len(ZOO) >= 50
    assert len({case.hazard for case in ZOO}) == len(ZOO)


@every_case
def test_two_builds_are_equal_and_leave_the_random_state_alone(case: Case) -> None:
    state = torch.get_rng_state()
    model, twin = case.build(), case.build()
    assert same_outputs(case.inputs(), case.inputs())
    assert torch.equal(state, torch.get_rng_state())
    left, right = (fingerprint(each, identity=False) for each in (model, twin))
    del left["modules"], right["modules"]  # hook ids are counted through the process
    assert differences(left, right) == []
    assert differences(fingerprint(model), fingerprint(model)) == []


@every_case
def test_eval_repeats_itself_and_every_mode_runs(case: Case) -> None:
    model = case.build()
    first = run(model, case, train=False)
    assert flat_tensors(first)
    assert same_outputs(first, run(model, case, train=False))
    with torch.no_grad():
        assert support.close_outputs(first, run(model, case, train=False))
    assert same_outputs(run(case.build(), case, train=True), run(case.build(), case, train=True))


@every_case
def test_backward_reaches_what_is_trainable(case: Case) -> None:
    model = case.build()
    run(model, case, train=True)  # lazy parameters and late layers exist from here on
    trainable = {n for n, p in support.named_parameters(model) if p.requires_grad}
    found = {n: g for n, g in gradients(model, case, train=True).items() if g is not None}
    assert set(found) <= trainable
    assert bool(found) == bool(trainable)
    dense = [g.to_dense() if g.is_sparse else g for g in found.values() if not g.is_meta]
    assert all(bool(gradient.isfinite().all()) for gradient in dense)
    assert not dense or any(bool(gradient.any()) for gradient in dense)


# ---- the hazards are there -------------------------------------------------------------------

CALLS = {
    "called_twice": {"fc": 2},
    "shared_module": {"first": 2, "second": 2},
    "shared_between_parents": {"left.fc1": 2, "right.0": 2},
    "never_called": {"bypassed": 0},
    "unused_submodule": {"spare.fc1": 0, "spare.fc2": 0},
    "self_attention": {"attention.out_proj": 0},
    "root_attention": {"out_proj": 0},
    # a hook on any child turns the fused kernel off: that the Linears run here is torch's way out
    "transformer_encoder": {f"layers.{i}.self_attn.out_proj": 0 for i in (0, 1)},
    "compiled_child": {"0": 1, "0._orig_mod": 1},
    "deepcopy_in_forward": {"fc1": 0},  # its copy is called
}


def calls_of_linears(model: nn.Module, case: Case) -> dict[str, int]:
    """How often a forward hook on each Linear fires in one forward in eval."""
    run(model, case, train=False)
    counts: Counter[int] = Counter()
    modules = model.named_modules(remove_duplicate=False)
    linears = {name: module for name, module in modules if is_linear(module)}
    for module in set(linears.values()):
        module.register_forward_hook(lambda m, args, out: counts.update([id(m)]))
    torch.compiler.reset()  # dynamo does not guard on hooks
    run(model, case, train=False)
    return {name: counts[id(module)] for name, module in linears.items()}


def is_linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "_orig_mod", module), nn.Linear)


@every_case
def test_every_linear_is_called_as_often_as_pinned(case: Case) -> None:
    found = calls_of_linears(case.build(), case)
    if case.name == "mixture_of_experts":
        assert found.pop("gate") == 1
        assert set(found.values()) == {0, 1}
    else:
        assert found == dict.fromkeys(found, 1) | CALLS.get(case.name, {})


def test_the_encoder_takes_its_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = torch._transformer_encoder_layer_fwd
    calls = []
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: (calls.append(1), fused(*a))[1]
    )
    case = BY_NAME["transformer_encoder"]
    with torch.no_grad():
        run(case.build(), case, train=False)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["checkpointed", "checkpointed_reentrant"])
def test_checkpointing_runs_the_block_again(name: str) -> None:
    model, calls = BY_NAME[name].build(), []
    model.block[0].register_forward_hook(lambda m, args, out: calls.append(out.requires_grad))
    gradients(model, BY_NAME[name], train=True)
    assert calls == ([True, True] if name == "checkpointed" else [False, True])


def test_layers_are_left_out_and_experts_idle_in_training() -> None:
    for name, part in (("layer_drop", "blocks"), ("mixture_of_experts", "experts")):
        found = gradients(BY_NAME[name].build(), BY_NAME[name], train=True)
        assert {grad is None for n, grad in found.items() if n.startswith(part)} == {True, False}


def test_marks_name_parameters_that_exist() -> None:
    marked = [case for case in ZOO if case.name.startswith("no_decay")]
    assert len(marked) == 10
    for case in marked:
        model = case.build()
        assert {name for name, _ in model.named_parameters()} >= model.MARKED


# ---- what plain models pass ------------------------------------------------------------------

PARAMETRIZED = {
    f"{norm}_{where}"
    for norm in ("weight_norm", "spectral_norm", "orthogonal")
    for where in ("child", "root")
}
UNCOPYABLE = {"lock_attribute", "legacy_weight_norm", "pruned"}
UNPICKLABLE = PARAMETRIZED | {
    "lambda_attribute",
    "lock_attribute",
    "weak_back_reference",
    "bound_forward",
    "script_child",
}
FAILS = {
    "deepcopy": UNCOPYABLE | {"script_child"},
    "deepcopy_mid_step": UNCOPYABLE | {"legacy_spectral_norm", "keeps_activation"},
    "pickle": UNPICKLABLE,
    "torch_save": UNPICKLABLE,
    "spawn": UNPICKLABLE,
    "load_both_ways": set(),
    "functional_call": {"patched_child", "checkpointed_reentrant"},
    "compile": {
        *("root_lstm", "lstm", "gru", "script_child"),  # not supported by dynamo
        *("mixture_of_experts", "layer_drop"),  # depends on the data
        *("greedy_getattr", "sealed_setattr", "deepcopy_in_forward"),
        *("legacy_spectral_norm", "user_backward_hook", "gradient_in_forward"),
    },
    "export": {
        *("mixture_of_experts", "dataclass_output", "deepcopy_in_forward", "script_child"),
        *("parameters_override", "gradient_in_forward"),
        # tensors assigned in forward
        *("assigns_reg_loss", "keeps_activation"),
        *("legacy_weight_norm", "legacy_spectral_norm", "pruned"),
    },
    "script": PARAMETRIZED
    | {
        *("odd_names", "hidden_in_list", "root_lstm", "slotted", "super_forward"),
        *("dataclass_output", "model_output_forward", "returns_loss", "dict_input"),
        *("kwargs_only", "star_arguments", "assigns_reg_loss", "sealed_setattr"),
        *("dataclass_module", "exact_type_check", "call_override", "decorated_forward"),
        *("lambda_attribute", "back_reference", "weak_back_reference", "patched_child"),
        *("deepcopy_in_forward", "legacy_weight_norm", "legacy_spectral_norm", "pruned"),
        *("user_forward_hooks", "user_pre_hooks", "hooks_itself", "functional_call_inside"),
        *("checkpointed", "checkpointed_reentrant", "gradient_in_forward", "keeps_activation"),
        *("functional_dropout", "stateful_dropout", "lazy_child", "lazy_root", "late_layers"),
        *("graph_module_root", "compiled_child"),
    },
}


@pytest.mark.parametrize("what", CHECKS)
def test_plain_models_fail_nothing_else(what: str) -> None:
    reasons = {case.name: support.plain_failure(case.name, what) for case in ZOO}
    surprises = {name: why for name, why in reasons.items() if why and name not in FAILS[what]}
    assert surprises == {}
    assert sum(why is None for why in reasons.values()) > 2 / 3 * len(ZOO)


class ForgetsDropout(OwnDropout):
    """Copies and pickles lose the rate: seen only in training, under one seed."""

    def __reduce_ex__(self, protocol: int) -> object:
        make, args, state, *_ = super().__reduce_ex__(protocol)
        other = copy.copy(self.drop)
        other.p = 0.0
        return make, args, {**state, "_modules": {**self._modules, "drop": other}}


class SharesWeights(Mlp):
    """A copy that holds the original's parameters."""

    def __deepcopy__(self, memo: dict[int, object]) -> "SharesWeights":
        return copy.copy(self)


class AsksTheData(Mlp):
    """A Python branch on values: two graphs under compile, none under export, no script."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden if all(value > 0 for value in hidden[0]) else hidden.relu())


class OneKeyMore(Mlp):
    """A buffer that the plain model has not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("more", torch.zeros(1))


class OutOfSight(Mlp):
    """Uses a tensor that functional_call cannot replace."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.fc1.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2((x @ self.hidden[0].t()).relu())


@pytest.mark.parametrize(
    ("what", "name", "saboteur"),
    [
        ("deepcopy", "own_dropout", ForgetsDropout),
        ("deepcopy", "mlp", SharesWeights),
        ("deepcopy_mid_step", "own_dropout", ForgetsDropout),
        ("pickle", "own_dropout", ForgetsDropout),
        ("torch_save", "own_dropout", ForgetsDropout),
        ("spawn", "own_dropout", ForgetsDropout),
        ("load_both_ways", "mlp", OneKeyMore),
        ("functional_call", "mlp", OutOfSight),
        ("compile", "mlp", AsksTheData),
        ("export", "mlp", AsksTheData),
        ("script", "mlp", AsksTheData),
    ],
)
def test_each_check_bites(what: str, name: str, saboteur: type[nn.Module]) -> None:
    assert support.plain_passes(BY_NAME[name], what)
    assert support.failure_of(what, saboteur(), BY_NAME[name]) is not None


# ---- the fingerprint sees ---------------------------------------------------------------------


def swap_class(model: nn.Module) -> None:
    model.__class__ = type("Mlp", (Mlp,), {"__module__": Mlp.__module__, "__qualname__": "Mlp"})


def reorder(model: nn.Module) -> None:
    model._modules["fc1"] = model._modules.pop("fc1")


def replace_hook(model: nn.Module) -> None:
    (key,) = model.fc2._forward_hooks
    model.fc2._forward_hooks[key] = print


def replace_parameter(model: nn.Module) -> None:
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().clone())


CHANGES = {
    "class": swap_class,
    "order of children": reorder,
    "another hook under one key": replace_hook,
    "equal parameter, another object": replace_parameter,
    "hook": lambda m: m.fc1.register_forward_hook(print),
    "pre-hook": lambda m: m.register_forward_pre_hook(print),
    "hook of state_dict": lambda m: m.register_state_dict_pre_hook(print),
    "hook of a tensor": lambda m: m.fc1.weight.register_hook(print),
    "hook after accumulation": lambda m: m.fc1.weight.register_post_accumulate_grad_hook(print),
    "attribute": lambda m: setattr(m.fc1, "note", 1),
    "attribute in the dict": lambda m: m.fc1.__dict__.update(note=None),
    "attribute of a parameter": lambda m: setattr(m.fc1.weight, "note", 1),
    "value": lambda m: m.fc1.weight.data[0, 0].add_(1e-3),
    "sign of zero": lambda m: m.fc1.bias.data[0].neg_(),
    "dtype": lambda m: m.fc2.double(),
    "gradient": lambda m: setattr(m.fc1.weight, "grad", torch.zeros(8, 6)),
    "frozen": lambda m: m.fc1.weight.requires_grad_(False),
    "mode": lambda m: m.fc1.eval(),
    "child": lambda m: m.add_module("drop", nn.Dropout(0.1)),
    "child of None": lambda m: m.register_module("drop", None),
    "buffer": lambda m: m.register_buffer("offset", torch.zeros(1), persistent=False),
    "forward": lambda m: setattr(m, "forward", m.fc1.forward),
    "parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.fc1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("identity", [True, False])
def test_the_fingerprint_sees(change: Callable[[nn.Module], object], identity: bool) -> None:
    model = BY_NAME["mlp"].build()
    model.fc1.bias.data[0] = 0.0
    model.fc2.register_forward_hook(len)
    before = fingerprint(model, identity=identity)
    change(model)
    seen = differences(before, fingerprint(model, identity=identity))
    assert bool(seen) == (identity or change is not replace_parameter), seen


def test_the_fingerprint_sees_what_is_put_on_a_class_of_its_own() -> None:
    model = BY_NAME["graph_module_root"].build()
    before = fingerprint(model)
    type(model).reg_loss = property(lambda self: 0)
    assert differences(before, fingerprint(model))


def test_a_copy_differs_by_identity_alone() -> None:
    model = BY_NAME["batch_norm"].build()
    other = copy.deepcopy(model)
    assert differences(fingerprint(model), fingerprint(other))
    left, right = (fingerprint(each, identity=False) for each in (model, other))
    assert differences(left, right) == []


def test_outputs_are_compared_bit_for_bit() -> None:
    zero = torch.zeros(2)
    assert same_outputs({"a": [zero, None]}, {"a": [zero.clone(), None]})
    assert same_outputs(zero / 0, zero / 0)
    for other in (-zero, zero.double(), zero[None], zero[:1], (zero,), nn.Parameter(zero)):
        assert not same_outputs(zero, other)
    with pytest.raises(TypeError, match="an output of type object at"):
        same_outputs({"a": object()}, {})
