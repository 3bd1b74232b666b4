"""From rules and a model to a policy: what reaches what, what wins, what the rows say."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pandas
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import differences, fingerprint
from test_where import slowly
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm

import regwrap as rw
from regwrap import (
    L1,
    L2,
    L2SP,
    Dropout,
    ElasticNet,
    GroupLasso,
    Orthogonal,
    Penalty,
    PolicyError,
    UnmatchedRule,
    WeightDecay,
)

torch.set_num_threads(1)

ROW_KEYS = {
    *("path", "layer", "shape", "parameters"),
    *("term", "site", "mechanism", "rule", "note"),
}


def square(w: Tensor) -> Tensor:
    return w.square().sum()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, 2))
        self.fc = nn.Linear(2, 2)
        self.norm = nn.LayerNorm((2, 2))


class Toy(nn.Module):
    """A root parameter, a tied weight, a shared module, a norm of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 2))
        self.embed = nn.Embedding(3, 2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.again = self.blocks[0].fc
        self.head = nn.Linear(2, 3)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) @ self.scale
        for block in self.blocks:
            x = block.norm.weight @ block.fc(x @ block.gain)
        return self.head(self.again(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def terms(model: nn.Module, rules: Any, **options: Any) -> dict[str, list[str]]:
    """The terms at every site, as the policy has them."""
    return terms_of(rw.plan(model, rules, **options))


def terms_of(policy: rw.Policy) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in policy.rows():
        if row["term"] is not None:
            found.setdefault(f"{row['path']}.{row['site']}".lstrip("."), []).append(row["term"])
    return found


# ---- precedence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (L2(0.1), {"0.weight": ["L2(0.1)"], "2.weight": ["L2(0.1)"]}),
        ({"": L2(0.1), "2": L2(0.2)}, {"0.weight": ["L2(0.1)"], "2.weight": ["L2(0.2)"]}),
        ({"2": L2(0.2), "": L2(0.1)}, {"0.weight": ["L2(0.1)"], "2.weight": ["L2(0.1)"]}),
        ({"0": L2(0.2), "0.weight": L1(0.1)}, {"0.weight": ["L2(0.2)", "L1(0.1)"]}),
        ({"0": L1(0.1) + L2(0.2)}, {"0.weight": ["L1(0.1)", "L2(0.2)"]}),
        ({"0": [L2(0.2), L1(0.1)]}, {"0.weight": ["L2(0.2)", "L1(0.1)"]}),
        ({"0": L2(0.1), re.compile("0"): L2(0)}, {"0.weight": ["L2(0.0)"]}),
        ({"0": ElasticNet(0.2, 0.5), "0.weight": L1(3)}, {"0.weight": ["L2(0.1)", "L1(3.0)"]}),
        ({"0": L1(3) + L2(4), "0.weight": ElasticNet(0.2, 0.5)},
         {"0.weight": ["L1(0.1)", "L2(0.1)"]}),
        (
            {"0": [ElasticNet(0.2, 0.5), Dropout(0.1)]},
            {"0.weight": ["L1(0.1)", "L2(0.1)"], "0.call": ["Dropout(0.1)"]},
        ),
        (
            (ElasticNet(0.2, 0.5), Orthogonal(0.1)),
            {f"{i}.weight": ["L1(0.1)", "L2(0.1)", "Orthogonal(0.1)"] for i in (0, 2)},
        ),
        (
            {"": L2(1e-4, on="all"), "2": L2(1e-2)},
            {
                "0.weight": ["L2(0.0001, on='all')"],
                "0.bias": ["L2(0.0001, on='all')"],
                "2.weight": ["L2(0.01)"],
                "2.bias": ["L2(0.0001, on='all')"],
            },
        ),
        ({"0": L2(0.1), "0.bias": L2(0.2)}, {"0.weight": ["L2(0.1)"], "0.bias": ["L2(0.2)"]}),
        ({"": L2(0.1), "2": None}, {"0.weight": ["L2(0.1)"]}),
        ({"": L2(0.1, on="all"), "2.bias": None, "0": None}, {"2.weight": ["L2(0.1, on='all')"]}),
        ({"": L1(1) + L2(2) + Dropout(0.5) + WeightDecay(3), "**": None}, {}),
        ([("2", None), ("", L1(1))], {"0.weight": ["L1(1.0)"], "2.weight": ["L1(1.0)"]}),
        ({"": Dropout(0.5), "2": Dropout(0.1)},
         {"0.call": ["Dropout(0.5)"], "2.call": ["Dropout(0.1)"]}),
        (
            {"0": Penalty(square, 1) + Penalty(square, 2) + Penalty(square, 3, name="other")},
            {"0.weight": ["Penalty(square, 2.0, name='square')",
                          "Penalty(square, 3.0, name='other')"]},
        ),
        (
            {"0": L1(1) + L2(2) + GroupLasso(3) + Orthogonal(4) + WeightDecay(5)},
            {"0.weight": ["L1(1.0)", "L2(2.0)", "GroupLasso(3.0)", "Orthogonal(4.0)",
                          "WeightDecay(5.0)"]},
        ),
        ({}, {}),
        ([], {}),
    ],
    ids=repr,
)  # fmt: skip
def test_the_later_rule_wins_within_its_kind_and_kinds_stack(rules: Any, expected: Any) -> None:
    assert terms(mlp(), rules) == expected


def test_a_list_of_lists_is_as_good_as_a_mapping() -> None:
    pairs = [["0", L2(0.1)], ("2", [L1(0.2)])]
    assert rw.plan(mlp(), pairs) == rw.plan(mlp(), {"0": L2(0.1), "2": L1(0.2)})


def test_rules_of_later_calls_follow_those_of_earlier_ones() -> None:
    model = mlp()
    rw.regularize(model, {"": L2(0.1) + L1(0.2), "2": Dropout(0.5)})
    rw.regularize(model, {"2": L2(0.3), "0": None})
    policy = rw.policy(model)
    assert policy.rules == (
        ("", L2(0.1)),
        ("", L1(0.2)),
        ("2", Dropout(0.5)),
        ("2", L2(0.3)),
        ("0", None),
    )
    assert [(e.path, repr(e.term), e.rule) for e in policy] == [
        ("2", "L1(0.2)", 1),
        ("2", "L2(0.3)", 3),
        ("2", "Dropout(0.5)", 2),
    ]
    assert [(r["path"], r["term"], r["rule"], r["note"]) for r in policy.overridden()] == [
        ("0", "L2(0.1)", 0, "cleared by rule 4"),
        ("0", "L1(0.2)", 1, "cleared by rule 4"),
        ("2", "L2(0.1)", 0, "replaced by rule 3"),
    ]
    keys = ("rule", "where", "term", "layers", "entries", "overridden")
    assert [tuple(count) for count in policy.counts()] == [keys] * 5
    assert [tuple(count.values()) for count in policy.counts()] == [
        (0, "", "L2(0.1)", 0, 0, 2),
        (1, "", "L1(0.2)", 1, 1, 1),
        (2, "2", "Dropout(0.5)", 1, 1, 0),
        (3, "2", "L2(0.3)", 1, 1, 0),
        (4, "0", None, 0, 0, 0),
    ]


# ---- the same against an oracle, over random rules -----------------------------------------------

WHERES = ["", "*", "**", "blocks", "blocks.*", "blocks.0", "**.fc", "again", "head", "embed"]
WHERES += ["scale", "**.bias", "**.norm", "head.weight", "blocks.{0..1}.gain", "**.*ain", "head.*"]
CLASSES = [nn.Linear, nn.Module, nn.LayerNorm, Block]
ONS = ["weight", "bias", "all", "gain", ("weight", "gain")]
STRONG = st.builds(
    lambda cls, strength, on: cls(strength, on=on),
    st.sampled_from([L1, L2, WeightDecay]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(ONS),
)
OTHER = st.sampled_from([None, None, Dropout(0.5), Dropout(0.25), Penalty(square, 1.0)])
RULE = st.tuples(st.sampled_from(WHERES + CLASSES), st.one_of(STRONG, OTHER))
NO_LINEAR = ("embed", "**.norm", nn.LayerNorm)  # of which a Dropout is refused
RULES = st.lists(
    RULE.filter(lambda rule: not (isinstance(rule[1], Dropout) and rule[0] in NO_LINEAR)),
    max_size=6,
)


def sites_of(model: nn.Module) -> dict[str, tuple[Any, str, nn.Module]]:
    """Every name of every site: the site itself, its own name, its module."""
    found: dict[str, tuple[Any, str, nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{path}.{name}".lstrip(".")] = (id(parameter), name, module)
        if isinstance(module, nn.Linear):
            found[f"{path}.call"] = (id(module), "call", module)
    return found


def reaches(where: Any, term: Any, name: str, own: str, module: nn.Module, root: nn.Module) -> bool:
    """What DESIGN 4 says, by brute force, of one name of one site."""
    path = name.rpartition(".")[0]
    above = [path.split(".")[:i] for i in range(len(path.split(".")) + 1)] if path else [[]]
    modules = dict(root.named_modules(remove_duplicate=False))

    def selects(at: str) -> bool:
        return slowly(where, at) if isinstance(where, str) else isinstance(modules[at], where)

    beneath = any(selects(".".join(part)) for part in above)
    named = (
        isinstance(where, str)
        and set(where.rpartition(".")[2]) != {"*"}
        and own != "call"
        and slowly(where, name)
    )
    if term is None:
        return beneath or named
    if isinstance(term, Dropout):
        return own == "call" and beneath
    if own == "call":
        return False
    weight = own != "bias" and not isinstance(module, nn.LayerNorm)
    covers = {"weight": weight, "bias": own == "bias", "all": True}
    on = term.on
    covered = covers[on] if isinstance(on, str) and on in covers else own in on
    return named or (beneath and covered)


def oracle(model: nn.Module, rules: list[Any]) -> tuple[Any, Any]:
    """Terms in force by site and kind, and what was overridden, as a sorted list."""
    names = sites_of(model)
    first = {site: name for name, (site, _, _) in reversed(names.items())}
    held: dict[str, dict[Any, Any]] = {}
    lost = []
    for index, (where, term) in enumerate(rules):
        hit = {
            first[site]
            for name, (site, own, module) in names.items()
            if reaches(where, term, name, own, module, model)
        }
        for name in hit:
            site = held.setdefault(name, {})
            kinds = list(site) if term is None else [(type(term), getattr(term, "name", ""))]
            for kind in kinds:
                if kind in site:
                    old = site.pop(kind)
                    verb = "cleared" if term is None else "replaced"
                    lost.append((name, *old, f"{verb} by rule {index}"))
            if term is not None:
                site[kinds[0]] = (repr(term), index)
    return {name: sorted(site.values()) for name, site in held.items() if site}, sorted(lost)


def seen(policy: rw.Policy) -> tuple[Any, Any]:
    """A policy in the oracle's terms."""
    held: dict[str, list[Any]] = {}
    for row in policy.rows():
        if row["term"]:
            name = f"{row['path']}.{row['site']}".lstrip(".")
            held.setdefault(name, []).append((row["term"], row["rule"]))
    lost = [
        (f"{row['path']}.{row['site']}".lstrip("."), row["term"], row["rule"], row["note"])
        for row in policy.overridden()
    ]
    return {name: sorted(found) for name, found in held.items()}, sorted(lost)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(RULES, min_size=1, max_size=3))
def test_policies_against_an_oracle_over_several_calls(calls: list[list[Any]]) -> None:
    model = Toy()
    every = [rule for rules in calls for rule in rules]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rw.RegwrapWarning)
        at_once = rw.plan(model, every, strict=False)
        for rules in calls:
            planned = rw.plan(model, rules, strict=False)
            assert rw.policy(rw.regularize(model, rules, strict=False)) == planned
    assert seen(planned) == oracle(Toy(), every)
    assert planned == at_once
    assert rw.policy(copy.deepcopy(model)) == planned
    assert rw.policy(pickle.loads(pickle.dumps(model))) == planned
    first_names = dict(model.named_parameters())
    listed = rw.penalties(model)
    weights = {
        name
        for name, found in seen(planned)[0].items()
        if any(term.startswith(("L1", "L2", "Penalty")) for term, _ in found)
    }
    assert set(listed) == weights
    assert weights <= set(first_names)
    assert sum(value.item() for value in listed.values()) == pytest.approx(model.reg_loss.item())
    for count in planned.counts():
        mine = [e for e in planned if e.rule == count["rule"]]
        assert count["entries"] == len(mine)
        assert count["layers"] == len({e.path for e in mine})
        assert count["overridden"] == sum(
            row["rule"] == count["rule"] for row in planned.overridden()
        )


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_have_all_keys_and_the_values_of_the_contract() -> None:
    policy = rw.plan(Toy(), {"": L2(0.1), "head": Dropout(0.5), "head.bias": WeightDecay(1)})
    plain = {"rule": None, "term": None, "site": None, "mechanism": None, "shape": None, "note": ""}
    l2 = {"rule": 0, "term": "L2(0.1)", "mechanism": "direct", "shape": (2, 2), "parameters": 4}
    expected: list[dict[str, Any]] = [
        {"path": "", "layer": "Toy", "site": "scale", **l2},
        {
            "path": "embed",
            "layer": "Embedding",
            "site": "weight",
            **l2,
            "shape": (3, 2),
            "parameters": 6,
            "note": "shared with head.weight",
        },
        {"path": "blocks.0", "layer": "Block", "site": "gain", **l2},
        {
            "path": "blocks.0.fc",
            "layer": "Linear",
            "site": "weight",
            **l2,
            "note": "shared with again.weight",
        },
        {"path": "blocks.0.norm", "layer": "LayerNorm", "parameters": 8},
        {"path": "blocks.1", "layer": "Block", "site": "gain", **l2},
        {"path": "blocks.1.fc", "layer": "Linear", "site": "weight", **l2},
        {"path": "blocks.1.norm", "layer": "LayerNorm", "parameters": 8},
        {
            "path": "head",
            "layer": "Linear",
            "site": "bias",
            "mechanism": "optimizer",
            "rule": 2,
            "term": "WeightDecay(1.0)",
            "shape": (3,),
            "parameters": 3,
        },
        {
            "path": "head",
            "layer": "Linear",
            "site": "call",
            "mechanism": "fx",
            "rule": 1,
            "term": "Dropout(0.5)",
            "parameters": 0,
        },
    ]
    rows = policy.rows()
    assert rows == [plain | row for row in expected]
    assert all(row.keys() == ROW_KEYS for row in rows)
    frame = pandas.DataFrame(rows)
    assert list(frame["path"]) == [row["path"] for row in expected]
    assert pandas.DataFrame(policy.overridden()).empty
    assert [e.row() for e in policy] == [row for row in rows if row["term"] is not None]
    assert len(policy) == 8


def test_rows_of_a_model_without_rules_are_its_layers() -> None:
    rows = rw.policy(mlp()).rows()
    assert [(r["path"], r["layer"], r["parameters"], r["term"]) for r in rows] == [
        ("0", "Linear", 6, None),
        ("2", "Linear", 6, None),
    ]
    assert rw.policy(nn.ReLU()).rows() == []


def test_a_policy_is_an_immutable_value() -> None:
    rules = {nn.Linear: L2(0.1), "0": Dropout(0.1), "2": Penalty(square, 1)}
    policy = rw.plan(mlp(), rules)
    assert policy == rw.plan(mlp(), rules)
    assert hash(policy) == hash(rw.plan(mlp(), rules))
    assert policy != rw.plan(mlp(), L2(0.1))
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert copy.deepcopy(policy) == policy
    assert isinstance(policy.rules, tuple)
    for value in (policy, next(iter(policy))):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)
    policy.rows().clear()
    policy.rows()[0]["term"] = "changed"
    policy.counts().clear()
    assert policy == rw.plan(mlp(), rules)


def test_a_policy_does_not_follow_the_model() -> None:
    model = mlp()
    before = rw.policy(rw.regularize(model, L2(0.1)))
    rw.regularize(model, {"0": None})
    assert len(before) == 2
    assert len(rw.policy(model)) == 1


# ---- plan is pure --------------------------------------------------------------------------------


def hazards() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    pruned = mlp()
    prune.random_unstructured(pruned[0], "weight", amount=0.5)
    return {
        "toy": Toy(),
        "spectral": nn.Sequential(parametrizations.spectral_norm(nn.Linear(2, 2))),
        "old spectral": nn.Sequential(old_spectral_norm(nn.Linear(2, 2))),
        "weight_norm": nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2))),
        "orthogonal": nn.Sequential(parametrizations.orthogonal(nn.Linear(2, 2))),
        "noise": nn.Sequential(Noisy.on(nn.Linear(2, 2))),
        "pruned": pruned,
        "lazy": nn.Sequential(nn.LazyLinear(2)),
        "lstm": nn.LSTM(2, 2),
        "regularized": rw.regularize(mlp(), {"": L2(0.1), "0": Dropout(0.5)}),
    }


class Noisy(nn.Module):
    """A parametrization that draws random numbers and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return weight + 0 * torch.randn(weight.shape)

    @classmethod
    def on(cls, layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", cls())
        layer.parametrizations.weight[0].calls.zero_()
        return layer


@pytest.mark.parametrize("name", list(hazards()))
@pytest.mark.parametrize(
    "rules",
    [
        L1(0.1) + L2(0.2),
        {"**": Dropout(0.5, at="input")},
        {"": None},
        {"nowhere": L2(0.1)},
        L2SP(0.1),
    ],
    ids=str,
)
def test_plan_and_policy_only_read(name: str, rules: Any) -> None:
    model = hazards()[name]
    before, state = fingerprint(model), torch.get_rng_state()
    for _ in range(2):
        with contextlib.suppress(rw.RegwrapError):
            rw.plan(model, rules)
        rw.policy(model).rows()
    assert not differences(before, fingerprint(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_strict_false_warns_and_keeps_the_rule() -> None:
    text = (
        "Rule 1 ('hed': L1(0.2)) matches nothing in Toy; the nearest names are 'head', "
        "'head.bias', 'embed'."
    )
    rules = {"head": L2(0.1), "hed": L1(0.2)}
    with pytest.raises(UnmatchedRule) as error:
        rw.plan(Toy(), rules)
    assert str(error.value) == text
    for act in (rw.plan, rw.regularize):
        with pytest.warns(rw.RegwrapWarning) as caught:
            result = act(Toy(), rules, strict=False)
        assert [str(w.message) for w in caught] == [text]
        assert caught[0].filename == __file__
    policy = rw.policy(result)
    assert policy.rules == (("head", L2(0.1)), ("hed", L1(0.2)))
    assert [count["entries"] for count in policy.counts()] == [1, 0]


def test_none_asks_for_a_match_but_not_for_anything_to_clear() -> None:
    assert len(rw.plan(mlp(), {"0": None})) == 0
    assert len(rw.plan(mlp(), {"1": None, "0.bias": None})) == 0
    with pytest.raises(UnmatchedRule, match=r"Rule 0 \('7': None\) matches nothing in Sequential"):
        rw.plan(mlp(), {"7": None})


def test_zero_strength_and_zero_rate() -> None:
    model = rw.regularize(
        mlp(), {"": (L2(0.1), Dropout(0.5, at="input")), "0": (L2(0), Dropout(0))}
    )
    rows = {(r["path"], r["site"]): r for r in rw.policy(model).rows()}
    assert rows["0", "weight"]["term"] == "L2(0.0)"
    assert rw.penalties(model)["0.weight"] == 0
    assert rows["0", "call"]["mechanism"] is None
    assert rows["0", "call"]["note"] == "rate 0: installs nothing"
    assert not model[0]._forward_hooks
    assert rw.policy(model).counts()[3]["entries"] == 0


# ---- sharing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["embed", "head", "embed.weight", "head.weight", "", nn.Linear])
def test_a_tied_weight_stands_under_its_first_name(where: Any) -> None:
    model = rw.regularize(Toy(), {where: L2(2.0)})
    rows = [r for r in rw.policy(model).rows() if r["term"] and r["shape"] == (3, 2)]
    assert [(r["path"], r["site"], r["note"]) for r in rows] == [
        ("embed", "weight", "shared with head.weight")
    ]
    assert rw.penalties(model)["embed.weight"] == model.head.weight.square().sum()
    assert "head.weight" not in rw.penalties(model)


def test_rules_meet_on_a_tied_weight_under_either_name() -> None:
    model = rw.regularize(Toy(), {"head": L2(1), "embed": L2(2) + L1(1)})
    assert terms_of(rw.policy(model)) == {"embed.weight": ["L2(2.0)", "L1(1.0)"]}
    rw.regularize(model, {"head.weight": None})
    assert terms_of(rw.policy(model)) == {}
    assert model.reg_loss == 0


def test_a_module_under_two_names_and_called_twice_counts_once() -> None:
    model = rw.regularize(Toy(), {"again": L2(2.0) + Dropout(0.5), "**.fc": L2(4.0)})
    expected = {
        "blocks.0.fc.weight": ["L2(4.0)"],
        "blocks.0.fc.call": ["Dropout(0.5)"],
        "blocks.1.fc.weight": ["L2(4.0)"],
    }
    assert terms_of(rw.policy(model)) == expected
    for _ in range(2):
        model(torch.zeros(2, 2, dtype=torch.long))
    weights = (model.again.weight, model.blocks[1].fc.weight)
    torch.testing.assert_close(model.reg_loss, 2 * sum(w.square().sum() for w in weights))


# ---- kinds of parameters -------------------------------------------------------------------------


def test_frozen_parameters_stay_in_the_policy_and_do_not_count() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    rw.regularize(model, L2(2.0))
    assert [r["note"] for r in rw.policy(model).rows()] == ["frozen: does not count", ""]
    assert {k: v.item() for k, v in rw.penalties(model).items()} == {
        "0.weight": 0,
        "2.weight": pytest.approx(model[2].weight.square().sum().item()),
    }
    model.reg_loss.backward()
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)
    assert rw.penalties(model)["0.weight"] > 0
    assert rw.policy(model).rows()[0]["note"] == ""
    model.requires_grad_(False)
    assert model.reg_loss == 0
    assert not model.reg_loss.requires_grad


@pytest.mark.parametrize("root", [False, True])
def test_lazy_layers_count_once_they_exist(root: bool) -> None:
    lazy = nn.LazyLinear(3)
    model = rw.regularize(lazy if root else nn.Sequential(lazy), L2(2.0) + L1(1.0, on="bias"))
    path = "" if root else "0"
    rows = rw.policy(model).rows()
    told = [(r["path"], r["site"], r["shape"], r["parameters"], r["note"]) for r in rows]
    note = "lazy: counts once it is initialized"
    assert told == [(path, "weight", None, 0, note), (path, "bias", None, 0, note)]
    assert model.reg_loss == 0
    model(torch.ones(1, 2))
    rows = rw.policy(model).rows()
    told = [(r["path"], r["site"], r["shape"], r["parameters"], r["note"]) for r in rows]
    assert told == [(path, "weight", (3, 2), 6, ""), (path, "bias", (3,), 3, "")]
    expected = lazy.weight.square().sum() + lazy.bias.abs().sum()
    torch.testing.assert_close(model.reg_loss, expected)
    assert type(rw.unregularize(model)) is (nn.Linear if root else nn.Sequential)


def test_an_uninitialized_parameter_of_ones_own() -> None:
    model = nn.Module()
    model.kernel = nn.UninitializedParameter()
    rw.regularize(model, L2(2.0))
    assert rw.penalties(model) == {}
    model.kernel.materialize((2, 2))
    nn.init.ones_(model.kernel)
    assert {k: v.item() for k, v in rw.penalties(model).items()} == {"kernel": 4}


def test_meta_models_are_planned_and_regularized_before_they_have_values() -> None:
    with torch.device("meta"):
        model = rw.regularize(mlp(), L2(2.0))
    assert model.reg_loss.is_meta
    assert rw.policy(model).rows()[0]["shape"] == (2, 2)
    model.to_empty(device="cpu").load_state_dict(mlp().state_dict())
    torch.testing.assert_close(
        model.reg_loss, model[0].weight.square().sum() + model[2].weight.square().sum()
    )


def test_complex_weights() -> None:
    model = rw.regularize(nn.Linear(2, 2, dtype=torch.complex64), L2(2.0))
    torch.testing.assert_close(model.reg_loss, model.weight.abs().square().sum())
    assert not model.reg_loss.is_complex()


def integers() -> nn.Module:
    model = mlp()
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize("term", [L2(0.1), L1(0.1, on="all"), GroupLasso(0.1), WeightDecay(0.1)])
def test_integer_parameters_are_refused_by_name(term: Any) -> None:
    with pytest.raises(PolicyError) as error:
        rw.plan(integers(), {"0.weight": term})
    assert str(error.value) == (
        f"Rule ('0.weight': {term!r}) names '0.weight', whose dtype torch.int8 has no gradient; "
        "name floating point parameters only."
    )
    assert "0.weight" not in terms(integers(), {"": term})
    assert terms(integers(), {"0.weight": None}) == {}


def test_integer_parameters_are_left_alone_by_what_reaches_others() -> None:
    rows = rw.plan(integers(), L2(0.1)).rows()
    assert rows[0]["term"] is None
    assert rows[0]["note"] == "weight is torch.int8: it has no gradient"
    with pytest.raises(UnmatchedRule) as error:
        rw.plan(integers(), {"0": L2(0.1)})
    assert str(error.value) == (
        "Rule 0 ('0': L2(0.1)) reaches nothing in Sequential: the parameters of '0' (Linear) are "
        "torch.int8, which have no gradient; name floating point parameters."
    )


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_")
@pytest.mark.parametrize("where", ["0", "0.weight", nn.Linear])
def test_quantized_layers_are_refused_by_name(where: Any) -> None:
    model = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    with pytest.raises(UnmatchedRule) as error:
        rw.plan(model, {where: L2(0.1)})
    if where == "0":
        assert str(error.value) == (
            "Rule 0 ('0': L2(0.1)) reaches nothing in Sequential: '0' (Linear) is quantized, its "
            "weight has no gradient; regularize before quantizing."
        )


def test_a_sparse_embedding_gets_a_dense_gradient_and_a_note() -> None:
    model = rw.regularize(nn.Embedding(4, 2, sparse=True), L2(0.1))
    assert rw.policy(model).rows()[0]["note"] == "its sparse gradient becomes dense"
    (model(torch.tensor([1])).sum() + model.reg_loss).backward()
    assert model.weight.grad.layout is torch.strided
    expected = 0.1 * model.weight.detach()
    expected[1] += 1
    torch.testing.assert_close(model.weight.grad, expected)


def test_experts_without_a_gradient_in_a_step_are_penalised_all_the_same() -> None:
    experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    rw.regularize(experts, L2(0.1))
    (experts[0](torch.ones(1, 2)).sum() + experts.reg_loss).backward()
    torch.testing.assert_close(experts[1].weight.grad, 0.1 * experts[1].weight)
    assert experts[1].bias.grad is None


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (nn.LSTM(2, 3, 2, bidirectional=True, proj_size=2), "weight"),
        (nn.GRU(2, 3), "weight"),
        (nn.RNNCell(2, 3), "weight"),
        (nn.MultiheadAttention(4, 2), "weight"),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True), "weight"),
        (nn.Bilinear(2, 2, 2), "weight"),
        (nn.Conv2d(2, 2, 3), "weight"),
        (nn.ConvTranspose1d(2, 2, 3), "weight"),
        (nn.EmbeddingBag(3, 2), "weight"),
        (nn.TransformerEncoderLayer(4, 2, 4), "weight"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_on_weight_covers_every_weight_and_no_bias(layer: nn.Module, weights: str) -> None:
    names = [name for name, _ in layer.named_parameters()]
    norms = {n for n in names if "norm" in n}
    assert list(terms(layer, L2(0.1))) == [n for n in names if weights in n and n not in norms]
    assert set(terms(layer, L2(0.1, on="all"))) == set(names)
    if any("bias" in n for n in names):
        assert list(terms(layer, L2(0.1, on="bias"))) == [n for n in names if "bias" in n]


def test_lstm_weights_by_name() -> None:
    assert list(terms(nn.LSTM(2, 3), L2(0.1, on=("weight_hh_l0", "bias_hh_l0")))) == [
        "weight_hh_l0",
        "bias_hh_l0",
    ]


def test_parameters_of_the_root() -> None:
    model = rw.regularize(Toy(), {"scale": L2(2.0)})
    assert terms_of(rw.policy(model)) == {"scale": ["L2(2.0)"]}
    assert {k: v.item() for k, v in rw.penalties(model).items()} == {"scale": 4}
    linear = rw.regularize(nn.Linear(2, 2), {"": L2(1), "bias": L1(1)})
    assert list(rw.penalties(linear)) == ["weight", "bias"]


def test_parameter_lists_and_dicts() -> None:
    model = nn.Module()
    model.several = nn.ParameterList([torch.ones(2, 2), torch.ones(2), torch.ones(3, 3)])
    model.named = nn.ParameterDict({"a": torch.ones(2, 2), "bias": torch.ones(2, 2)})
    assert list(terms(model, L2(1))) == ["several.0", "several.2", "named.a"]
    assert list(terms(model, {"several.{0..1}": L2(1)})) == ["several.0", "several.1"]
    assert list(terms(model, {re.compile(r"several\.\d"): L2(1)})) == [
        "several.0",
        "several.1",
        "several.2",
    ]
    assert list(terms(model, {"named.bias": L2(1)})) == ["named.bias"]
    assert rw.regularize(model, L2(2)).reg_loss == 4 + 9 + 4


# ---- what is left alone --------------------------------------------------------------------------


class LlamaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


def named_like(name: str) -> nn.Module:
    return type(name, (LlamaRMSNorm,), {})()


NORM_NAMES = ["LlamaRMSNorm", "FrozenBatchNorm2d", "LayerNorm2d", "BatchNormAct2d"]
NORM_NAMES += ["T5LayerNorm", "RMSNormGated", "LayerNormalization", "ScaleNorm"]


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((2, 2)),
        nn.RMSNorm((2, 2)),
        nn.BatchNorm2d(2),
        nn.GroupNorm(1, 2),
        nn.InstanceNorm1d(2, affine=True),
        nn.SyncBatchNorm(2),
        nn.LazyBatchNorm1d(),
        *map(named_like, NORM_NAMES),
    ],
    ids=lambda m: type(m).__name__,
)
def test_norm_layers_are_left_alone(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 2), norm)
    assert list(terms(model, L2(0.1))) == ["0.weight"]
    assert list(terms(model, L2(0.1, on="all")))[2] == "1.weight"
    assert list(terms(model, {"1.weight": L2(0.1)})) == ["1.weight"]
    assert list(terms(model, L2(0.1, on=("weight",)))) == ["0.weight", "1.weight"]
    with pytest.raises(UnmatchedRule, match="covers; write on='all', or the parameter's own name"):
        rw.plan(model, {"1": L2(0.1)})


class PreNorm(nn.Module):
    """Holds a norm, is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((2, 2))
        self.fn = nn.Linear(2, 2)


def test_what_is_around_a_norm_is_none() -> None:
    assert list(terms(PreNorm(), L2(0.1))) == ["fn.weight"]


class Marked(nn.Module):
    """`table`, `pos_embed` and `inner.weight` are marked in one of the spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 2, 2))
        self.table = nn.Parameter(torch.ones(2, 2))
        self.inner = nn.Linear(2, 2)
        self.outer = nn.Linear(2, 2)


MARKS = ("pos_embed", "table", "inner.weight")


def marked(
    value: Any, name: str = "no_weight_decay", cls: type = Marked
) -> Callable[[], nn.Module]:
    return lambda: type("Author", (cls,), {name: value})()


def on_instance(value: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Marked()
        model.no_weight_decay = value
        return model

    return make


def on_parameters(name: str, value: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Marked()
        for path in MARKS:
            setattr(model.get_parameter(path), name, value)
        return model

    return make


SPELLINGS = {
    "method": marked(lambda self: set(MARKS)),
    "jit.ignore": marked(torch.jit.ignore(lambda self: set(MARKS))),
    "staticmethod": marked(staticmethod(lambda: MARKS)),
    "classmethod": marked(classmethod(lambda cls: MARKS)),
    "property": marked(property(lambda self: list(MARKS))),
    "set": marked(set(MARKS)),
    "frozenset": marked(frozenset(MARKS)),
    "list": marked(list(MARKS)),
    "tuple": marked(MARKS),
    "dict": marked(dict.fromkeys(MARKS, 0.0)),
    "on the instance": on_instance(list(MARKS)),
    "method on the instance": on_instance(lambda: MARKS),
    "a module's name": marked({"pos_embed", "table", "inner"}),
    "patterns": marked({"pos_*", "tab?e", "inn*.weight"}),
    "keywords": marked(lambda self: {"pos", "table", "inner"}, "no_weight_decay_keywords"),
    "keywords as attribute": marked(["pos", "table", "inner"], "no_weight_decay_keywords"),
    "_no_weight_decay": on_parameters("_no_weight_decay", True),
    "no_weight_decay": on_parameters("no_weight_decay", True),
    "_optim": on_parameters("_optim", {"weight_decay": 0.0, "lr": 1e-3}),
}


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_what_the_author_marks_is_left_alone(spelling: str, depth: int) -> None:
    model = SPELLINGS[spelling]()
    for _ in range(depth):
        model = nn.ModuleDict({"part": model})
    prefix = "part." * depth
    assert list(terms(model, L2(0.1))) == [f"{prefix}outer.weight"]
    every = {f"{prefix}{n}" for n in (*MARKS, "inner.bias", "outer.weight", "outer.bias")}
    assert set(terms(model, L2(0.1, on="all"))) == every
    assert list(terms(model, {f"{prefix}table": L2(0.1)})) == [f"{prefix}table"]
    assert f"{prefix}table" in terms(model, L2(0.1, on="table"))


@pytest.mark.parametrize("spelling", ["method", "keywords", "_no_weight_decay"])
def test_marks_hold_for_a_regularized_part(spelling: str) -> None:
    model = SPELLINGS[spelling]()
    rw.regularize(model, L2(0.1))
    assert list(rw.penalties(model)) == ["outer.weight"]


class PerInstance(Marked):
    """Marks what each instance says, one of them nothing."""

    marks: Any = None

    @property
    def no_weight_decay(self) -> Any:
        return self.marks


def test_instances_of_one_class_may_mark_differently() -> None:
    model = nn.ModuleList([PerInstance(), PerInstance()])
    model[1].marks = MARKS
    sites = [f"0.{name}" for name in ("pos_embed", "table", "inner.weight", "outer.weight")]
    assert list(terms(model, L2(0.1))) == [*sites, "1.outer.weight"]


@pytest.mark.parametrize("value", [None, False, set(), lambda self: None, lambda self: set()])
def test_a_mark_of_nothing_marks_nothing(value: Any) -> None:
    assert len(terms(marked(value)(), L2(0.1))) == 4


def test_an_author_can_mark_a_whole_module() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["a"].no_weight_decay = True
    assert list(terms(model, L2(0.1))) == ["b.weight"]


@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "embed", "head"])
def test_a_tied_weight_is_left_alone_whichever_name_is_marked(name: str) -> None:
    model = marked({name}, cls=Toy)()
    assert "embed.weight" not in terms(model, L2(0.1))
    assert "embed.weight" in terms(model, {"head.weight": L2(0.1)})


class Inventive(Marked):
    """Answers to names that its author never heard of."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("no_weight_decay"):
            return lambda: {"outer"}
        return super().__getattr__(name)


def test_a_getattr_that_answers_to_anything_marks_nothing() -> None:
    assert len(terms(Inventive(), L2(0.1))) == 4


# ---- parametrized weights ------------------------------------------------------------------------


def parametrized(how: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    if how == "pruned":
        prune.random_unstructured(layer, "weight", amount=2)
    elif how == "old weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(layer)
    else:
        {
            "spectral_norm": parametrizations.spectral_norm,
            "orthogonal": parametrizations.orthogonal,
            "weight_norm": parametrizations.weight_norm,
            "old spectral_norm": old_spectral_norm,
            "random": Noisy.on,
        }[how](layer)
    return nn.Sequential(layer)


HOWS = ["weight_norm", "spectral_norm", "orthogonal", "random"]
HOWS += ["old weight_norm", "old spectral_norm", "pruned"]


@pytest.mark.parametrize("how", HOWS)
def test_a_parametrized_weight_is_read_as_its_effective_value(how: str) -> None:
    model = rw.regularize(parametrized(how), L2(2.0) + Orthogonal(0.0))
    (l2, orthogonal) = rw.policy(model).rows()
    assert (l2["site"], l2["shape"], l2["mechanism"]) == ("weight", (2, 3), "direct")
    assert l2["note"] == "parametrized: its effective value counts"
    assert orthogonal["site"] == "weight"
    model.eval()
    model(torch.ones(1, 3))  # the old hooks compute the weight in the forward
    expected = model[0].weight.detach().square().sum()
    model.train()
    before, state = fingerprint(model), torch.get_rng_state()
    value = model.reg_loss
    assert list(rw.penalties(model)) == ["0.weight"]
    if how != "random":
        assert torch.equal(torch.get_rng_state(), state)
    assert not differences(before, fingerprint(model))
    torch.testing.assert_close(value, expected)
    value.backward()
    assert any(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("how", HOWS)
def test_a_frozen_parametrized_weight_stays_under_its_plain_name(how: str) -> None:
    model = parametrized(how)
    model.requires_grad_(False)
    rw.regularize(model, L2(2.0))
    assert {k: v.item() for k, v in rw.penalties(model).items()} == {"0.weight": 0}
    assert "frozen" in rw.policy(model).rows()[0]["note"]


@pytest.mark.parametrize("how", HOWS)
def test_parametrizations_hide_nothing_from_on_all(how: str) -> None:
    assert set(terms(parametrized(how), L2(0.1, on="all"))) == {"0.weight", "0.bias"}
    assert list(terms(parametrized(how), {"0.weight": L2(0.1)})) == ["0.weight"]


# ---- L2SP ----------------------------------------------------------------------------------------


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    return model


@pytest.mark.parametrize("form", ["None", "state_dict", "mapping", "model", "wrapper"])
def test_l2sp_takes_every_form_of_reference(form: str) -> None:
    model = mlp()
    start = copy.deepcopy(model)
    reference = {
        "None": None,
        "state_dict": start.state_dict(),
        "mapping": {name: p.detach() for name, p in start.named_parameters()},
        "model": start,
        "wrapper": torch.compile(start, backend="eager"),
    }[form]
    if reference is not None:
        moved(model)
        moved(model)
    rw.regularize(model, L2SP(2.0, reference))
    if reference is None:
        assert model.reg_loss == 0
        moved(moved(model))
    assert model.reg_loss.item() == pytest.approx(2 * 4 * 4, rel=1e-5)
    moved(start)  # the values at the time of regularize
    assert model.reg_loss.item() == pytest.approx(2 * 4 * 4, rel=1e-5)


def test_the_same_l2sp_applied_again_keeps_its_reference() -> None:
    model = rw.regularize(mlp(), L2SP(2.0))
    moved(model)
    value = model.reg_loss.item()
    assert value == pytest.approx(8, rel=1e-5)
    rw.regularize(model, L2SP(2.0))
    rw.regularize(model, {"0": L1(0.0)})
    assert model.reg_loss.item() == pytest.approx(value)
    rw.regularize(model, {"0": L2SP(3.0)})  # another rule: from here
    assert model.reg_loss.item() == pytest.approx(value / 2)
    rw.regularize(model, {"": None})
    rw.regularize(model, L2SP(2.0))
    assert model.reg_loss == 0


def test_the_reference_follows_the_model_and_is_no_buffer() -> None:
    plain = mlp()
    model = rw.regularize(copy.deepcopy(plain), L2SP(2.0))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(model.named_buffers()) == []
    moved(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert other.reg_loss.item() == pytest.approx(8, rel=1e-5)
        moved(other)
        assert other.reg_loss.item() == pytest.approx(2 * 4 * 4, rel=1e-5)
    assert model.reg_loss.item() == pytest.approx(8, rel=1e-5)
    assert model.double().reg_loss.dtype == torch.float64
    assert model.reg_loss.item() == pytest.approx(8, rel=1e-5)
    assert model.half().reg_loss.dtype == torch.float32
    assert model.to("meta").reg_loss.is_meta


def test_a_partial_reference_leaves_the_new_head_out_with_none() -> None:
    model = mlp()
    backbone = {"0.weight": torch.zeros(2, 2)}
    with pytest.raises(PolicyError) as error:
        rw.plan(model, L2SP(0.1, backbone))
    assert str(error.value) == (
        "Rule ('': L2SP(0.1, reference=<dict>)) cannot act on '2.weight', which is not in the "
        "reference; give reference= a state_dict or a model that has it, or leave it out with "
        "{'2.weight': None}."
    )
    assert list(terms(model, {"": L2SP(0.1, backbone), "2.weight": None})) == ["0.weight"]


def test_a_tied_weight_is_found_in_the_reference_under_either_name() -> None:
    for name in ("embed.weight", "head.weight"):
        model = rw.regularize(Toy(), {"head.weight": L2SP(2.0, {name: torch.zeros(3, 2)})})
        torch.testing.assert_close(model.reg_loss, model.embed.weight.square().sum())


L2SP_REFUSALS: list[tuple[str, Callable[[], nn.Module], Any, str]] = [
    ("meta", lambda: mlp().to("meta"), None, "is on the meta device and has no values"),
    ("lazy", lambda: nn.Sequential(nn.LazyLinear(2)), None, "is lazy and has no values yet"),
    ("meta reference", mlp, mlp().to("meta"), "is a meta tensor in the reference"),
    ("lazy reference", mlp, nn.Sequential(nn.LazyLinear(2)), "is not in the reference"),
    ("list", mlp, {"0.weight": [[0.0]]}, "is a list in the reference"),
    ("another", mlp, nn.Conv2d(1, 1, 1), "is not in the reference"),
    (
        "shape",
        mlp,
        {"0.weight": torch.zeros(3, 2)},
        "has shape (2, 2), its reference (3, 2)",
    ),
]


@pytest.mark.parametrize(
    ("make", "reference", "why"), [r[1:] for r in L2SP_REFUSALS], ids=[r[0] for r in L2SP_REFUSALS]
)
def test_l2sp_without_values_to_pull_toward(make: Any, reference: Any, why: str) -> None:
    model, term = make(), L2SP(0.1, reference)
    before = fingerprint(model)
    for act in (rw.plan, rw.regularize):
        with pytest.raises(PolicyError) as error:
            act(model, term)
        assert str(error.value) == (
            f"Rule ('': {term!r}) cannot act on '0.weight', which {why}; give reference= a "
            "state_dict or a model that has it, or leave it out with {'0.weight': None}."
        )
    assert not differences(before, fingerprint(model))


def test_a_lazy_layer_with_a_reference_waits_for_its_values() -> None:
    model = rw.regularize(
        nn.Sequential(nn.LazyLinear(2)), L2SP(2.0, {"0.weight": torch.ones(2, 3)})
    )
    assert model.reg_loss == 0
    model(torch.ones(1, 3))
    torch.testing.assert_close(model.reg_loss, (model[0].weight - 1).square().sum())


def test_a_weight_replaced_by_one_of_another_shape_asks_for_a_new_start() -> None:
    model = rw.regularize(nn.Sequential(nn.Embedding(2, 2)), L2SP(2.0))
    model[0].weight = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(PolicyError) as error:
        rw.reg_loss(model)
    assert str(error.value) == (
        "L2SP: the weight has shape (3, 2) now, its reference (2, 2); regularize again after a "
        "parameter is replaced."
    )
    rw.regularize(model, L2SP(2.0))
    assert model.reg_loss == 0


def test_a_layer_that_lost_its_parameter_is_told() -> None:
    model = rw.regularize(mlp(), L2SP(2.0))
    model[0].weight = None
    row = rw.policy(model).rows()[0]
    assert row["note"] == "the module has no such parameter now"
    assert row["mechanism"] is None
    rw.regularize(model, {"2": L1(0.1)})
    assert model.reg_loss.isfinite()


def test_parts_that_were_regularized_apart_agree_on_their_tied_weight() -> None:
    model = Toy()
    rw.regularize(model.embed, L2(1.0) + WeightDecay(3))
    rw.regularize(model.head, L2(4.0) + WeightDecay(5))
    assert terms_of(rw.policy(model)) == {"embed.weight": ["L2(4.0)", "WeightDecay(5.0)"]}
    torch.testing.assert_close(rw.reg_loss(model), 2 * model.embed.weight.square().sum())
    (group,) = (g for g in rw.param_groups(model) if g["params"][0] is model.embed.weight)
    assert group["weight_decay"] == 5
