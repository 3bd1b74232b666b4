"""Guarantee 5 over every model of the zoo: undo is exact; and a call that fails leaves no trace."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from laws import PENALTIES, every_case, fingerprint_of, hooked, put_on, regularized, rules_of, told
from support import backward, differences, digest, run, same_outputs
from torch import nn
from zoo import BY_NAME, Case

import regwrap as rw
from regwrap import L2, L2SP, Dropout, Orthogonal, PolicyError, RegwrapWarning, identity

# ---- undo ------------------------------------------------------------------------------------


@every_case
def test_undo_is_exact(case: Case) -> None:
    model = case.build()
    before = fingerprint_of(model)
    put_on(model, rules_of(case))
    assert rw.unregularize(model) is model
    assert differences(before, fingerprint_of(model)) == []


@every_case
def test_undo_of_several_calls_is_exact(case: Case) -> None:
    model = case.build()
    before = fingerprint_of(model)
    for rules in (rules_of(case), {"": None}, rules_of(case), rules_of(case)):
        put_on(model, rules)
    rw.unregularize(model)
    assert differences(before, fingerprint_of(model)) == []


@every_case
def test_undo_without_a_policy_touches_nothing(case: Case) -> None:
    model = case.build()
    before = fingerprint_of(model)
    rw.unregularize(model)
    assert differences(before, fingerprint_of(model)) == []


@every_case
def test_undo_after_use_leaves_a_plain_model(case: Case) -> None:
    """Called in both modes, trained a step, its penalty differentiated, then undone."""
    model, twin = case.build(), case.build()
    put_on(model, rules_of(case))
    with told():
        for train in (False, True):
            run(model, case, train=train)
            run(twin, case, train=train)
        backward(rw.reg_loss(model))
        support.take_gradients(model)
        rw.unregularize(model)
    assert differences(structure(twin), structure(model)) == []


def structure(model: nn.Module) -> dict[str, Any]:
    """Of every module its classes and the names of all it has and of its hooks, without ids."""
    return {
        path: {
            "mro": module["mro"],
            "attributes": [(name, hook_names(value)) for name, value in module["attributes"]],
        }
        for path, module in support.fingerprint(model, identity=False)["modules"].items()
    }


def hook_names(value: Any) -> list[str]:
    """The values of a dict of hooks, whose keys are counted through the process."""
    inside = value[1] if isinstance(value, tuple) and len(value) == 2 else ()
    return [e[1] for e in inside if isinstance(e, tuple) and isinstance(e[1], str)]


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
}


@pytest.mark.parametrize("how", COPIES)
@every_case
def test_undo_on_a_copy_is_exact_and_leaves_the_original(case: Case, how: str) -> None:
    if not support.plain_passes(case, how):
        return
    model = case.build()
    plain = support.fingerprint(COPIES[how](model), identity=False)
    put_on(model, rules_of(case))
    before = support.fingerprint(model)
    other = COPIES[how](model)
    assert differences(before, support.fingerprint(model)) == []
    assert rw.policy(other) == rw.policy(model)
    # close, not equal: of a tensor subclass a copy may be plain, and sums in another order
    torch.testing.assert_close(rw.reg_loss(other), rw.reg_loss(model), equal_nan=True)
    rw.unregularize(other)
    assert differences(plain, support.fingerprint(other, identity=False)) == []
    assert differences(before, support.fingerprint(model)) == []


@every_case
def test_undo_of_the_original_leaves_the_copy(case: Case) -> None:
    if not support.plain_passes(case, "deepcopy"):
        return
    model = regularized(case)
    other, twin = copy.deepcopy(model), regularized(case)
    policy = rw.policy(model)
    rw.unregularize(model)
    assert rw.policy(other) == policy
    assert len(hooked(other)) == len(hooked(twin))
    with told():
        assert same_outputs(run(other, case, train=True), run(twin, case, train=True))


@every_case
def test_another_process_has_the_policy_our_hooks_and_room_for_more(case: Case) -> None:
    """A hook that the user registers there fires, and ours too; undo is exact there as here."""
    if not support.plain_passes(case, "spawn"):
        return
    model = regularized(case)
    job = (pickle.dumps(model), case.name, torch.get_num_threads())
    theirs = support.new_process().submit(used_by_its_user, *job).result()
    assert theirs == used_by_its_user(*job)
    assert theirs["rows"] == rw.policy(model).rows()
    assert theirs["hooks"] == len(hooked(model))


def used_by_its_user(pickled: bytes, name: str, threads: int) -> dict[str, Any]:
    """What comes of a pickled model, here or in another process."""
    torch.set_num_threads(threads)
    model, case = pickle.loads(pickled), BY_NAME[name]
    fired: list[str] = []
    for path, layer in model.named_modules():
        if layer in hooked(model):
            # integer ids start again in a new process: ours must not be one that is given out
            layer.register_forward_hook(lambda m, args, out, path=path: fired.append(path))
    with told():
        found = {
            "rows": rw.policy(model).rows(),
            "hooks": len(hooked(model)),
            "training": digest(run(model, case, train=True)),
            "fired": fired,
            "eval": digest(run(model, case, train=False)),
        }
        rw.unregularize(model)
        return {**found, "undone": hooked(model), "plain": digest(run(model, case, train=True))}


# ---- a failed call leaves no trace -----------------------------------------------------------


def raises(path: str, module: nn.Module) -> bool:
    raise ZeroDivisionError("a predicate of the user's")


GOOD = ("", PENALTIES)

FAILURES: dict[str, tuple[Any, type[Exception]]] = {
    "unmatched": ([GOOD, ("nowhere.at.all", L2(1.0))], rw.UnmatchedRule),
    "nothing to clear": ([GOOD, ("nowhere", None)], rw.UnmatchedRule),
    "no rules": (3, TypeError),
    "no pair": ([GOOD, ("",)], TypeError),
    "no where": ([GOOD, (3, L2(1.0))], TypeError),
    "no term": ([GOOD, ("", 1e-4)], TypeError),
    "a bad reference": ([GOOD, ("", L2SP(1.0, {}, on="all"))], PolicyError),
    "the user's predicate": ([GOOD, (raises, L2(1.0))], ZeroDivisionError),
}


# Models on which GOOD alone is refused: by another error than the rule after it.
REFUSED_SOONER = ("script_child", "no_parameters", "empty", "late_layers")


@pytest.mark.parametrize("again", [False, True], ids=["plain", "regularized"])
@every_case
def test_a_refused_call_leaves_no_trace(case: Case, again: bool) -> None:
    model = regularized(case) if again else case.build()
    before = fingerprint_of(model)
    for kind, (rules, error) in FAILURES.items():
        if case.name in REFUSED_SOONER:
            error = (error, rw.RegwrapError)
        for call in (rw.regularize, rw.plan):
            with pytest.raises(error):
                call(model, rules)
        assert differences(before, fingerprint_of(model)) == [], kind


@every_case
def test_a_warning_made_an_error_leaves_no_trace(case: Case) -> None:
    model = case.build()
    before = fingerprint_of(model)
    rules = {**rules_of(case), "nowhere": L2(1.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RegwrapWarning):
            rw.regularize(model, rules, strict=False)
    assert differences(before, fingerprint_of(model)) == []


@pytest.mark.parametrize("again", [False, True], ids=["plain", "regularized"])
@pytest.mark.parametrize("name", ["mlp", "graph_module_root", "weight_norm_root", "lazy_child"])
@pytest.mark.parametrize("where", ["record.write", "output.sync", "identity.splice"])
def test_a_failure_half_way_leaves_no_trace(
    name: str, where: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even out of memory in the middle of the surgery."""
    case = BY_NAME[name]
    model = case.build()
    if again:
        rw.regularize(model, L2SP(1e-3, on="all") if name != "lazy_child" else L2(1.0))
    before = fingerprint_of(model)
    module, function = where.split(".")
    target: Any = getattr(rw.surgery, module)
    does, calls = getattr(target, function), []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > (function != "splice"):
            raise MemoryError
        return does(*args)

    monkeypatch.setattr(target, function, fails)
    if name == "weight_norm_root" and function != "splice":
        pytest.skip("one layer: nothing is half-way")
    if function == "splice" and identity.is_spliced(model, rw.penalty.RegularizedMixin):
        return  # spliced already: what has been put there stays
    with pytest.raises(MemoryError):
        rw.regularize(model, {"": L2(1e-3), nn.Linear: Dropout(0.5)})
    assert calls
    assert differences(before, fingerprint_of(model)) == []


def test_a_failure_after_the_surgery_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last thing that a call does is to warn of what was compiled already."""
    monkeypatch.setattr(rw.surgery, "_warned", False)
    torch.compiler.reset()
    case = BY_NAME["root_sequential"]
    run(torch.compile(case.build(), backend="eager"), case)
    model = case.build()
    before = fingerprint_of(model)
    with pytest.raises(RegwrapWarning, match="after something had been compiled"):
        rw.regularize(model, {nn.Linear: Dropout(0.5)})
    assert differences(before, fingerprint_of(model)) == []


def test_orthogonal_of_a_vector_leaves_no_trace() -> None:
    model = BY_NAME["mlp"].build()
    before = fingerprint_of(model)
    with pytest.raises(PolicyError, match="Orthogonal"):
        rw.regularize(model, {"": PENALTIES, "fc1.bias": Orthogonal(1.0)})
    assert differences(before, fingerprint_of(model)) == []
