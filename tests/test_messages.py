"""What regwrap says when something is wrong: expected, found, where, the way out, in one sentence.

The wording of bad arguments of terms is in test_terms.py, of Where in test_where.py, of L2SP's
references and of integer parameters in test_planning.py.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import differences, fingerprint
from torch import Tensor, nn

import regwrap as rw
from regwrap import (
    L1,
    L2,
    L2SP,
    Dropout,
    GroupLasso,
    Orthogonal,
    Penalty,
    PolicyError,
    UnmatchedRule,
    WeightDecay,
    Where,
)

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.block = nn.ModuleDict(
            {"v_proj": nn.Linear(4, 4), "act": nn.ReLU(), "norm": nn.LayerNorm(4)}
        )
        self.attn = nn.MultiheadAttention(4, 2)
        self.levels = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script itself
        return nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))


def complex_() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64))


def compiled_inside() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))


def nowhere(path: str, module: nn.Module) -> bool:
    return False


RULES = (
    "rules must be a mapping {where: term}, a sequence of (where, term) pairs or a term such as "
    "L2(1e-4), not "
)
RIGHT = "must have a term such as L2(1e-4), a list of terms or None on its right, not "
IDLE = (
    "reaches only Linear layers that are never called in Net (at most a function uses their "
    "weights), so that a Dropout after them would never act; name another layer."
)
COVERS = "covers; write on='all', or the parameter's own name."

# The model, the rules, the error and its whole text.
ERRORS: list[tuple[Callable[[], nn.Module], Any, type[Exception], str]] = [
    # a where that matches nothing
    (Net, {"v_proj": L2(0.1)}, UnmatchedRule,
     "Rule 0 ('v_proj': L2(0.1)) matches nothing in Net; the nearest names are '**.v_proj', "
     "'block.v_proj', 'q_proj'."),
    (Net, {"q_projj": L2(0.1)}, UnmatchedRule,
     "Rule 0 ('q_projj': L2(0.1)) matches nothing in Net; the nearest names are 'q_proj', "
     "'q_proj.bias', 'q_proj.weight'."),
    (Net, {"": L2(0.1), "q_pro": None}, UnmatchedRule,
     "Rule 1 ('q_pro': None) matches nothing in Net; the nearest names are 'q_proj', "
     "'q_proj.bias', 'q_proj.weight'."),
    (Net, {nn.Conv2d: L2(0.1)}, UnmatchedRule,
     "Rule 0 ('nn.Conv2d': L2(0.1)) matches nothing in Net; the nearest names are 'ModuleDict', "
     "'MultiheadAttention', 'Linear'."),
    (Net, {re.compile("block.vproj"): L2(0.1)}, UnmatchedRule,
     "Rule 0 (\"re.compile('block.vproj')\": L2(0.1)) matches nothing in Net; the nearest names "
     "are 'block.v_proj', 'block.v_proj.bias', 'block.v_proj.weight'."),
    (Net, {Where("q_proj", type=nn.Conv2d): L2(0.1)}, UnmatchedRule,
     "Rule 0 (\"Where(path='q_proj', type=nn.Conv2d)\": L2(0.1)) matches nothing in Net; the "
     "nearest names are 'q_proj', 'q_proj.bias', 'q_proj.weight'."),
    (Net, {Where(type=nn.LazyLinear): L2(0.1)}, UnmatchedRule,
     "Rule 0 ('Where(type=nn.LazyLinear)': L2(0.1)) matches nothing in Net; the nearest names are "
     "'Linear', 'LayerNorm', 'NonDynamicallyQuantizableLinear'."),
    (Net, {nowhere: L2(0.1)}, UnmatchedRule,
     "Rule 0 ('nowhere': L2(0.1)) matches nothing in Net; the nearest names are 'block.norm', "
     "'block.norm.weight', 'levels'."),
    (nn.ReLU, {"head": None}, UnmatchedRule,
     "Rule 0 ('head': None) matches nothing in ReLU; it has no modules to name."),
    # a where that matches, and a term that finds nothing there
    (Net, {"block.act": L2(0.1)}, UnmatchedRule,
     "Rule 0 ('block.act': L2(0.1)) reaches nothing in Net: 'block.act' (ReLU) has no parameters; "
     "name a layer."),
    (Net, {"block.norm": L2(0.1)}, UnmatchedRule,
     "Rule 0 ('block.norm': L2(0.1)) reaches nothing in Net: 'block.norm' (LayerNorm) has no "
     f"parameter that on='weight' {COVERS}"),
    (Net, L2(0.1, on="gain"), UnmatchedRule,
     "Rule 0 ('': L2(0.1, on='gain')) reaches nothing in Net: '' (Net) has no parameter that "
     f"on='gain' {COVERS}"),
    (Net, {"block.norm": GroupLasso(0.1)}, UnmatchedRule,
     "Rule 0 ('block.norm': GroupLasso(0.1)) reaches nothing in Net: 'block.norm' (LayerNorm) has "
     "no parameter that on='weight' covers; write the parameter's own name."),
    (Net, L2(0.1, on="levels"), UnmatchedRule,
     "Rule 0 ('': L2(0.1, on='levels')) reaches nothing in Net: the parameters of '' (Net) are "
     "torch.int8, which have no gradient; name floating point parameters."),
    (Net, {"levels": WeightDecay(0.1)}, PolicyError,
     "Rule ('levels': WeightDecay(0.1)) names 'levels', whose dtype torch.int8 has no gradient; "
     "name floating point parameters only."),
    (Net, {"block.n*": Dropout(0.1)}, UnmatchedRule,
     "Rule 0 ('block.n*': Dropout(0.1)) reaches no Linear layer in Net: none lies in 'block.norm' "
     "(LayerNorm); name a Linear, or what holds one."),
    (Net, {"q_proj.weight": Dropout(0.1)}, UnmatchedRule,
     "Rule 0 ('q_proj.weight': Dropout(0.1)) reaches no Linear layer in Net: 'q_proj.weight' is a "
     "parameter; name its layer 'q_proj'."),
    (Net, {nn.LayerNorm: Dropout(0.1)}, UnmatchedRule,
     "Rule 0 ('nn.LayerNorm': Dropout(0.1)) reaches no Linear layer in Net: none lies in "
     "'block.norm' (LayerNorm); name a Linear, or what holds one."),
    (Net, {"attn.out_proj": Dropout(0.1)}, PolicyError,
     f"Rule ('attn.out_proj': Dropout(0.1)) {IDLE}"),
    # a site that cannot be acted on
    (Net, GroupLasso(0.1, dim=2), PolicyError,
     "Rule ('': GroupLasso(0.1, dim=2)) cannot act on 'q_proj.weight', which has shape (4, 4) and "
     "no dim 2; give a dim that it has, or leave it out with {'q_proj.weight': None}."),
    (Net, GroupLasso(0.1, size=3), PolicyError,
     "Rule ('': GroupLasso(0.1, size=3)) cannot act on 'q_proj.weight', which has 4 units along "
     "dim 0, no multiple of 3; give a size that divides them, or leave it out with "
     "{'q_proj.weight': None}."),
    (Net, {"q_proj": Orthogonal(0.1, on="bias")}, PolicyError,
     "Rule ('q_proj': Orthogonal(0.1, on='bias')) cannot act on 'q_proj.bias', which has shape "
     "(4,) and no rows; name a weight of 2 dimensions, or leave it out with "
     "{'q_proj.bias': None}."),
    (scripted, L2(0.1), PolicyError,
     "Rule ('': L2(0.1)) cannot act on '0.weight', which is a ScriptModule; regularize before "
     "scripting, or leave it out with {'0.weight': None}."),
    (complex_, {"0": Dropout(0.1)}, PolicyError,
     "Rule ('0': Dropout(0.1)) cannot act on '0', which has complex weights, for which torch has "
     "no dropout; penalise it instead, or leave it out with {'0': None}."),
    (compiled_inside, Dropout(0.1), PolicyError,
     "Rule ('': Dropout(0.1)) cannot act on '0._orig_mod', which is inside a compiled submodule; "
     "compile afterwards, or leave it out with {'0._orig_mod': None}."),
    # a dropout or an output that is not there
    (Net, Dropout(0.1, at="activation"), PolicyError,
     "Rule ('': Dropout(0.1, at='activation')) finds no place behind the activation of 'q_proj': "
     "the code that calls it cannot be read; write at='output'."),
    (Net, {"q_proj": Dropout(0.1, kind=nn.PReLU)}, PolicyError,
     "Rule ('q_proj': Dropout(0.1, kind=torch.nn.PReLU)) has a kind that cannot be built from a "
     "rate alone (TypeError); name a class whose one argument is the rate."),
    (Net, {"q_proj": L2(0.1), "block": L1(0.1, on="output")}, PolicyError,
     "Rule ('block': L1(0.1, on='output')) reaches only modules that are never called in Net: they "
     "have no forward of their own, or a function uses their weights; name a module that runs."),
    # rules of another form
    (Net, 3, TypeError, f"{RULES}3 of type int."),
    (Net, None, TypeError, f"{RULES}None of type NoneType."),
    (Net, "head", TypeError, f"{RULES}'head' of type str."),
    (Net, L2, TypeError, f"{RULES}<class 'regwrap.terms.L2'> of type type."),
    (Net, [L2(0.1)], TypeError, "Rule 0 must be a pair (where, term), not L2(0.1)."),
    (Net, [("q_proj", L2(0.1)), ("block",)], TypeError,
     "Rule 1 must be a pair (where, term), not ('block',)."),
    (Net, {"q_proj": 0.1}, TypeError, f"Rule 0 ('q_proj') {RIGHT}0.1."),
    (Net, {"q_proj": []}, TypeError, f"Rule 0 ('q_proj') {RIGHT}[]."),
    (Net, {"q_proj": [None]}, TypeError, f"Rule 0 ('q_proj') {RIGHT}[None]."),
    (Net, {"q_proj": [L2(0.1), "L1"]}, TypeError, f"Rule 0 ('q_proj') {RIGHT}[L2(0.1), 'L1']."),
    (Net, {nn.Linear: L2}, TypeError,
     f"Rule 0 ('nn.Linear') {RIGHT}<class 'regwrap.terms.L2'>."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "rules", "kind", "text"),
    ERRORS,
    ids=[f"{i}: {e[3][:60]}" for i, e in enumerate(ERRORS)],
)
def test_errors_of_a_plan_and_the_model_after_them(
    make: Callable[[], nn.Module], rules: Any, kind: type[Exception], text: str
) -> None:
    model = make()
    before, state = untouched(model), torch.get_rng_state()
    for act in (rw.plan, rw.regularize):
        with pytest.raises(kind) as error:
            act(model, rules)
        assert type(error.value) is kind
        assert str(error.value) == text
        assert not differences(before, untouched(model))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "rules", "kind", "text"),
    [e for e in ERRORS if e[0] is Net],
    ids=[f"{i}: {e[3][:60]}" for i, e in enumerate(ERRORS) if e[0] is Net],
)
def test_a_second_call_that_fails_leaves_the_first_in_force(
    make: Callable[[], nn.Module], rules: Any, kind: type[Exception], text: str
) -> None:
    model = rw.regularize(make(), {"q_proj": L2(0.1) + Dropout(0.5)})
    before, policy = untouched(model), rw.policy(model)
    with pytest.raises(kind):
        rw.regularize(model, rules)
    assert not differences(before, untouched(model))
    assert rw.policy(model) == policy


def untouched(model: nn.Module) -> dict[str, Any]:
    """The model's fingerprint; a ScriptModule makes new Python objects at each look at it."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return {"attributes": sorted(vars(model)), "hooks": [len(m._forward_hooks) for m in model]}
    return fingerprint(model)


@pytest.mark.parametrize("text", [e[3] for e in ERRORS], ids=range(len(ERRORS)))
def test_a_message_is_one_sentence_on_one_line(text: str) -> None:
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text
    assert "{where}" not in text
    assert "  " not in text


def test_the_errors_are_of_the_families_that_one_catches() -> None:
    assert issubclass(UnmatchedRule, rw.RegwrapError)
    assert issubclass(UnmatchedRule, LookupError)
    assert issubclass(PolicyError, rw.RegwrapError)
    assert issubclass(PolicyError, ValueError)
    assert issubclass(rw.RegwrapWarning, UserWarning)


# ---- the models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["regularize", "plan"])
def test_no_model_and_no_rules(name: str) -> None:
    act = getattr(rw, name)
    way_out = "to regularize every instance of a class, decorate it with @regularized(rules)."
    for found in (Net, {"": L2(0.1)}, 3):
        with pytest.raises(TypeError) as error:
            act(found)
        assert (
            str(error.value) == f"{name}(model, rules) needs an nn.Module, not {found!r}; {way_out}"
        )
    with pytest.raises(TypeError) as error:
        act(Net())
    assert str(error.value) == (
        f"{name}(model, rules) needs rules, such as L2(1e-4) or {{'head': None}}."
    )


@pytest.mark.parametrize("found", [Net, 3, None, "model", [1]], ids=repr)
@pytest.mark.parametrize(
    "act", [rw.policy, rw.reg_loss, rw.penalties, rw.unregularize, rw.summary, rw.param_groups]
)
def test_what_is_no_model(act: Callable[[Any], Any], found: Any) -> None:
    with pytest.raises(TypeError) as error:
        act(found)
    assert str(error.value) == (
        f"regwrap needs an nn.Module, not {found!r} of type {type(found).__name__}."
    )


def test_a_model_in_the_text_is_cut_to_one_line() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    with pytest.raises(TypeError) as error:
        rw.plan(Net(), model)  # type: ignore[arg-type]
    text = str(error.value)
    assert text.startswith(f"{RULES}Sequential( (0): Linear(in_features=2,")
    assert text.endswith("... of type Sequential.")
    with pytest.raises(TypeError) as error:
        rw.plan(Net(), {model: L2(0.1)})
    assert len(str(error.value)) < 250
    with pytest.raises(TypeError) as error:
        L2(torch.zeros(100, 100))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_the_first_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    monkeypatch.setattr("regwrap.sites.is_fsdp1", lambda module: module is model.q_proj)
    with pytest.raises(PolicyError) as error:
        rw.plan(model, L2(0.1))
    assert str(error.value) == (
        "FullyShardedDataParallel at 'q_proj' flattens parameters, so that a penalty would see one "
        "shard only; wrap the model with torch.distributed.fsdp.fully_shard instead."
    )


# ---- the decorator -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decorate", "kind", "text"),
    [
        (
            lambda: rw.regularized(Net),
            TypeError,
            "@regularized needs rules: write @regularized({...}) above class Net.",
        ),
        (
            lambda: rw.regularized(L2(0.1))(int),
            TypeError,
            "@regularized decorates a class of nn.Module, not <class 'int'>; for an object write "
            "regwrap.regularize(model, rules).",
        ),
        (
            lambda: rw.regularized(L2(0.1))(nn.Linear(2, 3)),
            TypeError,
            "@regularized decorates a class of nn.Module, not Linear(in_features=2, "
            "out_features=3, bias=True); for an object write regwrap.regularize(model, rules).",
        ),
        (lambda: rw.regularized(3), TypeError, f"{RULES}3 of type int."),
        (
            lambda: rw.regularized({"": L2SP(0.1)}),
            PolicyError,
            "L2SP(0.1) under @regularized would pull toward random weights: they are loaded after "
            "__init__; give reference= a state_dict or a model.",
        ),
        (
            lambda: rw.regularized(lambda model: L2SP(0.1))(type("Late", (Net,), {}))(),
            PolicyError,
            "L2SP(0.1) under @regularized would pull toward random weights: they are loaded after "
            "__init__; give reference= a state_dict or a model.",
        ),
        (
            lambda: rw.regularize(Net, L2(0.1)),
            TypeError,
            f"regularize(model, rules) needs an nn.Module, not {Net!r}; to regularize every "
            "instance of a class, decorate it with @regularized(rules).",
        ),
        (
            lambda: rw.regularized({"q_pro": L2(0.1)})(type("Typo", (Net,), {}))().reg_loss,
            UnmatchedRule,
            "Rule 0 ('q_pro': L2(0.1)) matches nothing in Typo; the nearest names are "
            "'q_proj', 'q_proj.bias', 'q_proj.weight'.",
        ),
    ],
)
def test_errors_of_the_decorator(decorate: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        decorate()
    assert str(error.value) == text


# ---- at the read of reg_loss, at pickling, in the forward ----------------------------------------


def broken(w: Tensor) -> Tensor:
    return w.no_such_method()


def test_an_attribute_error_inside_reg_loss_is_not_hidden() -> None:
    model = rw.regularize(nn.Linear(2, 2), Penalty(broken, 0.1))
    with pytest.raises(RuntimeError) as error:
        _ = model.reg_loss
    assert str(error.value) == (
        "reg_loss could not be computed: 'Parameter' object has no attribute 'no_such_method'"
    )


def test_a_penalty_that_cannot_be_pickled_is_named() -> None:
    def local(w: Tensor) -> Tensor:
        return w.sum()

    model = rw.regularize(nn.Linear(2, 2), Penalty(local, 0.1))
    with pytest.raises(PolicyError) as error:
        pickle.dumps(model)
    name = "test_a_penalty_that_cannot_be_pickled_is_named.<locals>.local"
    assert str(error.value).startswith(
        f"Penalty({name}, 0.1, name='local') cannot be pickled because its function <function "
        f"{name} at 0x"
    )
    assert str(error.value).endswith("; define the function at the top level of a module.")


class Pair(nn.Linear):
    """A Linear that returns two tensors."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_dropout_after_a_layer_that_returns_no_tensor() -> None:
    model = rw.regularize(Pair(2, 2), Dropout(0.5))
    model.eval()(torch.ones(1, 2))
    with pytest.raises(PolicyError) as error:
        model.train()(torch.ones(1, 2))
    assert str(error.value) == (
        "Pair returned tuple, no tensor: a Dropout cannot act on it; leave the layer out with None."
    )


# ---- warnings ------------------------------------------------------------------------------------


def heard(act: Callable[[], object]) -> list[str]:
    """The warnings of regwrap, each of which points at this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    assert all(w.category is rw.RegwrapWarning for w in caught), [str(w.message) for w in caught]
    assert all(w.filename == __file__ for w in caught), [w.filename for w in caught]
    return [str(w.message) for w in caught]


def test_a_rule_without_effect_under_strict_false() -> None:
    text = (
        "Rule 0 ('q_pro': None) matches nothing in Net; the nearest names are 'q_proj', "
        "'q_proj.bias', 'q_proj.weight'."
    )
    assert heard(lambda: rw.plan(Net(), {"q_pro": None}, strict=False)) == [text]
    assert heard(lambda: rw.regularize(Net(), {"q_pro": None}, strict=False)) == [text]
    assert heard(lambda: rw.plan(Net(), {"q_proj": None}, strict=False)) == []


class Owner(nn.Linear):
    reg_loss = "mine"


def test_a_model_with_a_reg_loss_of_its_own() -> None:
    text = (
        "Owner has a reg_loss of its own, which it keeps; read the penalties with "
        "regwrap.reg_loss(model)."
    )
    model = Owner(2, 2)
    assert heard(lambda: rw.regularize(model, L2(0.1))) == [text]
    assert model.reg_loss == "mine"
    assert rw.reg_loss(model) > 0


def test_modules_that_were_replaced() -> None:
    model = rw.regularize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), L2(0.1))
    model[0] = nn.Linear(2, 2)
    text = (
        "Modules of Sequential that had a policy have been replaced since regularize (1 of them): "
        "their penalties and hooks are gone; call regularize again."
    )
    assert heard(lambda: rw.reg_loss(model)) == [text]
    assert heard(lambda: rw.reg_loss(model)) == []


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_dropout_after_something_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regwrap.surgery._warned", False)
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    text = (
        "A hook was put on or taken from a model after something had been compiled: "
        "torch.compiler.reset() was called, since torch.compile does not look at hooks; compiled "
        "models compile again at their next call."
    )
    assert heard(lambda: rw.regularize(nn.Linear(2, 2), Dropout(0.5))) == [text]
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    assert heard(lambda: rw.regularize(nn.Linear(2, 2), Dropout(0.5))) == []


@pytest.mark.parametrize("name", ["summary", "doctor"])
def test_an_optimizer_that_is_none(name: str) -> None:
    text = f"{name}(model, optimizer) needs a torch.optim.Optimizer, not 3 of type int."
    with pytest.raises(TypeError, match=re.escape(text)):
        getattr(rw, name)(nn.Linear(2, 2), optimizer=3)
