"""The five guarantees as laws over every model of the zoo: what is untouched, and what acts.

Undo and failed calls are in `test_laws_undo.py`, numbers in `test_laws_reg_loss.py`, foreign
classes, hooks and compiling in `test_laws_classes.py`.
"""

import functools
import inspect
import re
from typing import Any

import pytest
import support
import torch
import torch.nn.functional as F
from laws import (
    RATE,
    RULES,
    every_case,
    fingerprint_of,
    hooked,
    inserted_aside,
    is_linear,
    put_on,
    rate_zero_in_place,
    regularized,
    rules_of,
    taken,
    told,
)
from support import CHECKS, differences, digest, gradients, run, same_outputs
from torch import nn
from zoo import BY_NAME, ZOO, Case

import regwrap as rw
from regwrap import L1, L2, Dropout
from regwrap.surgery import fx

# ---- 1: eval is untouched --------------------------------------------------------------------


@every_case
def test_eval_is_bit_identical(case: Case) -> None:
    plain, model = case.build(), regularized(case)
    with told():
        assert same_outputs(run(plain, case, train=False), run(model, case, train=False))
        assert digest(gradients(plain, case)) == digest(gradients(model, case))


@every_case
def test_eval_without_gradients_is_bit_identical(case: Case) -> None:
    plain, model = case.build(), regularized(case)
    for mode in (torch.no_grad, torch.inference_mode):
        if mode is torch.inference_mode and case.name == "gradient_in_forward":
            continue  # the plain model raises
        with told(), mode():
            assert same_outputs(run(plain, case, train=False), run(model, case, train=False))


# ---- in training, at rate 0 and at a rate ----------------------------------------------------


def rate_zero_by_rule(model: nn.Module) -> None:
    """A later rule overrides, and installs nothing."""
    put_on(model, {"": Dropout(0.0)})
    assert not hooked(model)


@pytest.mark.parametrize("zero", [rate_zero_in_place, rate_zero_by_rule])
@every_case
def test_training_at_rate_zero_is_bit_identical(case: Case, zero: Any) -> None:
    plain, model = case.build(), regularized(case)
    if hooked(model) or taken(model):
        zero(model)
    with told():
        for _ in range(2):  # buffers move in training: twice
            assert same_outputs(run(plain, case, train=True), run(model, case, train=True))
            assert digest(gradients(plain, case)) == digest(gradients(model, case))


def edited_by_hand(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """Every layer's forward ends in a dropout, as an editor of its source would write it."""
    for layer in layers:
        layer.forward = functools.partial(with_dropout, layer, layer.forward)
    return model


def with_dropout(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    return F.dropout(forward(*args, **kwargs), RATE, layer.training)


# The Linears that a dropout acts on, where those are not all.
DROPPED = {
    "script_child": ["2"],
    "compiled_child": ["2"],
    "root_attention": [],
    "complex_parameters": [],
    "linear_returns_tuple": ["fc2"],
    "stateful_dropout": ["fc1"],
}
STILL = ("on_meta", "zero_size")  # no values; no outputs but 0


# The models in which a layer is called by code that is not straight, or by none of the model's own:
# every other one is rewritten.
NOT_STRAIGHT = """
    exact_type_check shared_between_parents mixture_of_experts skipped_container sequential_owner
    module_list_owner module_dict_owner nested_containers odd_names iterates_children
    root_linear root_sequential slotted delegating_getattr custom_setattr back_reference
    bound_forward reduce_by_function reduce_by_type drops_state rebuilds_state custom_deepcopy
    deepcopy_in_forward weight_norm_root spectral_norm_root orthogonal_root checkpointed
    checkpointed_reentrant zero_size gradient_in_forward no_grad_in_forward autocast_in_forward
    decorated_forward functional_call_inside batch_norm train_override lazy_child lazy_root
    linear_subclass script_child graph_module_root graph_module_child compiled_child
    conv1d_layer
"""


@every_case
def test_every_layer_in_a_straight_body_is_rewritten(case: Case) -> None:
    model = regularized(case)
    by_hook = [layer for layer in model.modules() if "_regwrap_p" in vars(layer)]
    assert bool(by_hook) == (case.name in NOT_STRAIGHT.split())


@every_case
def test_dropout_acts_as_in_a_twin_edited_by_hand(case: Case) -> None:
    model, twin = regularized(case), case.build()
    if taken(model):
        return  # the twin stacks a second dropout there; test_dropouts.py compares these
    if case.name in DROPPED:
        layers = [twin.get_submodule(name) for name in DROPPED[case.name]]
    else:
        layers = [m for m in twin.modules() if is_linear(m)]
    edited_by_hand(twin, layers)
    with told():
        ours, edited = (run(each, case, train=True) for each in (model, twin))
        assert same_outputs(ours, edited)
        assert digest(gradients(model, case)) == digest(gradients(twin, case))
        moved = not same_outputs(ours, run(case.build(), case, train=True))
    assert moved == (bool(hooked(model)) and case.name not in STILL)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_at_the_stated_rate(rate: float) -> None:
    torch.manual_seed(0)
    layer = rw.regularize(nn.Linear(1, 100_000), Dropout(rate))
    nn.init.constant_(layer.weight, 1.0)
    nn.init.zeros_(layer.bias)
    out = layer(torch.ones(4, 1))
    dropped = (out == 0).float().mean().item()
    assert abs(dropped - rate) < 4 * (rate * (1 - rate) / out.numel()) ** 0.5
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - rate)))
    assert not torch.equal(out[0], out[1])  # every row has its own mask
    assert abs(out.mean().item() - 1) < 0.02


def test_the_mask_is_drawn_once_a_call() -> None:
    case = BY_NAME["returned_twice"]
    first, second, _ = run(regularized(case), case, train=True)
    assert first is second
    layer = regularized(BY_NAME["root_linear"])
    out = run(layer, BY_NAME["root_linear"], train=True)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    F.dropout(torch.ones_like(out), RATE, True)
    assert torch.equal(after, torch.get_rng_state())


# ---- 2 and 3: the checkpoint and the object are untouched ------------------------------------


@every_case
def test_what_can_be_seen_of_the_object_is_as_before(case: Case) -> None:
    model = case.build()
    before = fingerprint_of(model)
    put_on(model, rules_of(case))
    with inserted_aside(model):
        after = fingerprint_of(model)
    root = after["modules"][""]["mro"]
    assert [c for c in before["modules"][""]["mro"] if c not in root] == []
    for each in (before, after):
        each["modules"] = {path: without_ours(m) for path, m in each["modules"].items()}
    assert differences(before, after) == []


def without_ours(module: dict[str, Any]) -> dict[str, Any]:
    """The attributes and hooks of one module in a fingerprint, those of ours left out."""
    kept = [(k, _without_key(v)) for k, v in module["attributes"] if not k.startswith("_regwrap")]
    return {"attributes": kept, "slots": module["slots"]}


def _without_key(seen: Any) -> Any:
    if isinstance(seen, tuple) and isinstance(seen[1], list):
        return seen[0], [e for e in seen[1] if not (isinstance(e, tuple) and e[0] == "'regwrap'")]
    return seen


PER_INSTANCE = ("weight_norm_root", "spectral_norm_root", "orthogonal_root")


@every_case
def test_the_class_looks_and_answers_as_before(case: Case) -> None:
    model = case.build()
    cls, names, doc = type(model), set(dir(model)), inspect.getdoc(model)
    authored = list(cls.__mro__)
    if case.name in PER_INSTANCE:  # made for this object by another tool, and made anew over ours
        authored.remove(cls)
    put_on(model, rules_of(case))
    assert all(isinstance(model, c) for c in authored)
    assert inspect.getdoc(model) == doc
    if case.name != "greedy_getattr":
        new = {name for name in set(dir(model)) - names if "regwrap" not in name}
        assert new <= {"reg_loss", "__jit_unused_properties__", "__weakref__"}
    ours = {
        "__reduce_ex__",
        "__setstate__",
        "__deepcopy__",
        "__init_subclass__",
        "__reduce__",
        "__init__",
    }
    rewrite = fx.rewritten(model)
    written = () if rewrite is None else [name for name, _ in rewrite.sources]
    for name in set(dir(cls)) - ours - {"__dict__", "__class__", "__module__", "__weakref__"}:
        found, plain = (inspect.getattr_static(c, name) for c in (type(model), cls))
        assert found is plain or not callable(plain) or name in ("cls_to_become", *written), name
        assert name not in written or inspect.signature(found) == inspect.signature(plain)


@pytest.mark.parametrize("what", [what for what in CHECKS if what not in ("compile", "spawn")])
@every_case
def test_what_the_plain_model_passes_ours_passes(case: Case, what: str) -> None:
    passes(case, what)


@every_case
def test_what_the_plain_model_passes_in_another_process_ours_passes(case: Case) -> None:
    passes(case, "spawn")


@pytest.mark.slow
@every_case
def test_what_compiles_in_one_graph_still_does(case: Case) -> None:
    passes(case, "compile")


# Hooks in TorchScript are typed, and ours has the types of nn.Linear's forward.
NOT_SCRIPTED = {"linear_subclass": "a Linear whose forward takes more than one argument"}


def passes(case: Case, what: str) -> None:
    with told():
        failure = support.failure_of(what, regularized(case), case)
    if what == "script" and case.name in NOT_SCRIPTED:
        assert failure is not None, "no limit any more"
        pytest.xfail(NOT_SCRIPTED[case.name])
    if what == "script" and any(map(fx.rewritten, regularized(case).modules())):
        return  # TorchScript does not take code that was written anew: a stated limit
    assert failure is None or not support.plain_passes(case, what), failure


# ---- the policy ------------------------------------------------------------------------------


@every_case
def test_the_plan_is_the_policy_and_touches_nothing(case: Case) -> None:
    model = case.build()
    before = fingerprint_of(model)
    with told():
        planned = rw.plan(model, rules_of(case), strict=False)
    assert differences(before, fingerprint_of(model)) == []
    put_on(model, rules_of(case))
    assert planned == rw.policy(model)
    assert planned.rows() == rw.policy(model).rows()


@every_case
def test_reading_the_policy_and_the_penalty_touches_nothing(case: Case) -> None:
    model = regularized(case)
    before = fingerprint_of(model)
    rw.policy(model), rw.reg_loss(model), rw.penalties(model), rw.param_groups(model)
    assert differences(before, fingerprint_of(model)) == []


MORE: dict[Any, Any] = {"": [L2(1e-2), L1(0.0)]}


@every_case
def test_two_calls_are_one_call_with_both_rules(case: Case) -> None:
    rules = [(where, terms) for part in (rules_of(case), MORE) for where, terms in part.items()]
    if case.name in ("script_child", "compiled_child"):
        rules.append(("0", None))
    once, twice = case.build(), case.build()
    put_on(once, rules)
    put_on(twice, rules[: len(rules_of(case))])
    with told():
        planned = rw.plan(twice, rules[len(rules_of(case)) :], strict=False)
    put_on(twice, rules[len(rules_of(case)) :])
    assert planned == rw.policy(twice) == rw.policy(once)
    assert digest(rw.reg_loss(twice)) == digest(rw.reg_loss(once))
    assert len(hooked(once)) == len(hooked(twice))
    with told():
        assert same_outputs(run(once, case, train=True), run(twice, case, train=True))


@every_case
def test_the_same_rules_again_change_nothing_that_acts(case: Case) -> None:
    model = regularized(case)
    entries = [(e.path, e.site, e.term, e.mechanism) for e in rw.policy(model)]
    value, layers = digest(rw.reg_loss(model)), hooked(model)
    put_on(model, rules_of(case))
    assert entries == [(e.path, e.site, e.term, e.mechanism) for e in rw.policy(model)]
    assert (value, layers) == (digest(rw.reg_loss(model)), hooked(model))


def test_the_laws_meet_every_way_of_acting() -> None:
    """A law over models on which nothing acts would say nothing."""
    models = {case.name: regularized(case) for case in ZOO}
    dropping = [name for name, model in models.items() if hooked(model)]
    penalised = [name for name, model in models.items() if rw.reg_loss(model).requires_grad]
    assert len(dropping) > 0.85 * len(ZOO)
    assert len(penalised) > 0.9 * len(ZOO)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("script_child", "'0.weight', which is a ScriptModule"),
        ("compiled_child", "'0._orig_mod', which is inside a compiled submodule"),
        ("root_attention", "reaches only Linear layers that are never called"),
        ("complex_parameters", "'fc1', which has complex weights"),
    ],
)
def test_what_the_laws_leave_out_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(rw.PolicyError, match=re.escape(why)):
        rw.regularize(BY_NAME[name].build(), RULES)


def test_a_layer_that_returns_no_tensor_is_refused_at_its_first_call_in_training() -> None:
    case = BY_NAME["linear_returns_tuple"]
    model = put_on(case.build(), RULES)
    assert same_outputs(run(model, case, train=False), run(case.build(), case, train=False))
    with pytest.raises(rw.PolicyError, match="TupleLinear returned tuple, no tensor"):
        run(model, case, train=True)


@pytest.mark.parametrize("name", ["root_lstm", "bilinear", "bare_parameters", "empty"])
def test_the_empty_path_names_no_layer(name: str) -> None:
    """A Dropout for the whole model reaches its Linears, also where the model is a leaf."""
    with pytest.raises(rw.UnmatchedRule, match="reaches no Linear layer"):
        rw.regularize(BY_NAME[name].build(), Dropout(0.5))
