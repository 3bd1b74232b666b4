# ruff: noqa: E501 a message stands on one line, as it is printed
"""Rules in files: what is written comes back, what is wrong is named with file and rule."""

import builtins
import json
import re
import sys

import pytest
from torch import nn

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
    RegwrapError,
    WeightDecay,
    Where,
    load_rules,
    plan,
    rules_from_dicts,
    rules_to_dicts,
    save_rules,
)


def relu_sum(w):
    return w.relu().sum()


RULES = {
    "": L2(1e-4, on="all"),
    nn.Linear: [L1(1e-5), Dropout(0.1)],
    re.compile(r"[01]"): L2(1e-3),
    "0": GroupLasso(1e-3, dim=1, size=2),
    "{0,2}": WeightDecay(0.01, on=("weight",)),
    Where("*", type=nn.Linear, regex="[02]"): Orthogonal(0.5),
    "2": None,
    "2.bias": L2SP(0.25),
}
PAIRS = [
    (where, term)
    for where, terms in RULES.items()
    for term in (terms if isinstance(terms, list) else [terms])
]


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"rules.{suffix}"
    save_rules(RULES, path)
    assert load_rules(path) == PAIRS
    assert plan(model(), load_rules(str(path))) == plan(model(), RULES)


def test_every_form_of_rules_is_written():
    for rules in (RULES, PAIRS, L2(1e-4), L1(1e-4) + L2(1e-5), tuple(PAIRS)):
        back = rules_from_dicts(json.loads(json.dumps(rules_to_dicts(rules))))
        assert plan(model(), back) == plan(model(), rules)


def test_a_file_says_what_one_would_write(tmp_path):
    rules = [(nn.Linear, L2(1e-4)), ("head", L1(0.1, on="bias")), ("head", None)]
    save_rules(rules, tmp_path / "r.toml")
    assert (tmp_path / "r.toml").read_text() == (
        '[[rule]]\nwhere = { type = "torch.nn.Linear" }\nterm = "L2"\nstrength = 0.0001\n\n'
        '[[rule]]\nwhere = "head"\nterm = "L1"\nstrength = 0.1\non = "bias"\n\n'
        '[[rule]]\nwhere = "head"\nterm = "none"\n'
    )


def test_no_rules_and_strange_names(tmp_path):
    path = tmp_path / "r.toml"
    for rules in ([], [('a"b\\c.[x]', L2(1.0)), ("", L2(1e-30, on=("a", 'b"')))]):
        save_rules(rules, path)
        assert load_rules(path) == rules


def test_read_toml_by_hand(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(
        """
        [[rule]]
        where = {type = "torch.nn.Linear", path = "0"}
        term = "ElasticNet"
        strength = 1e-3
        l1_ratio = 0.25
        [[rule]]
        where = ""
        term = "Dropout"
        p = 0.5
        kind = "torch.nn.AlphaDropout"
        """
    )
    here = Where("0", type=nn.Linear)
    assert load_rules(path) == [
        *((here, term) for term in ElasticNet(1e-3, 0.25)),
        ("", Dropout(0.5, kind=nn.AlphaDropout)),
    ]


def test_flags_of_a_regex_are_kept():
    written = rules_to_dicts([(re.compile("HEAD", re.I), L2(1.0))])
    assert written == [{"where": {"regex": "(?i)HEAD"}, "term": "L2", "strength": 1.0}]
    (where, _), = rules_from_dicts(written)  # fmt: skip
    assert where.fullmatch("head")
    assert rules_to_dicts([(where, L2(1.0))]) == written


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"where": "a", "term": "L3", "strength": 1.0}, "knows no term 'L3'; write 'L2' or 'L1'"),
        ({"where": "a", "term": "dropot", "p": 0.1}, "knows no term 'dropot'; write 'Dropout'"),
        ({"where": "a", "term": "L2", "strenght": 1.0}, "L2 has no 'strenght'; write 'strength'"),
        ({"where": "a", "term": "L2"}, "L2 needs 'strength'; write strength = 0.1 with your number"),
        ({"where": "a", "term": "L2", "strength": "1e-4"},
         "L2: strength must be a finite number >= 0, not '1e-4' of type str; write strength = 1e-4, without quotes"),
        ({"where": "a", "term": "L2", "strength": -1}, "L2: strength must be a finite number >= 0, not -1"),
        ({"where": "a", "term": "L2", "strength": True}, "not True of type bool"),
        ({"where": "a", "term": "Dropout", "p": 1.0}, "Dropout: p must be a number in [0, 1), not 1.0"),
        ({"where": "a", "term": "none", "strength": 1.0}, "a term 'none' has no 'strength' and takes nothing else"),
        ({"where": "a", "term": None}, "term must be a name such as 'L2', or 'none' to clear, not None"),
        ({"where": "a", "term": "Penalty", "fn": "f", "strength": 1.0}, "a Penalty needs a function, which a file cannot hold; add it in Python"),
        ({"where": "a", "term": "L2SP", "strength": 1.0, "reference": "x"}, "an L2SP's reference is tensors, which a file cannot hold; leave it out"),
        ({"term": "L2", "strength": 1.0}, "has no 'where'; write where = 'head', with \"\" for the whole model"),
        ({"where": "a"}, "has no 'term'; write term = 'L2', or 'none' to clear."),
        ({"where": "a", "strength": 1.0, "trem": "L2"}, "has no 'term' but 'trem'; write term = 'L2'"),
        ({"were": "a", "term": "none"}, "has no 'where' but 'were'; write where = 'head'"),
        ({"where": 3, "term": "none"}, "where must be a path or a table of path, type and regex, not 3"),
        ({"where": {}, "term": "none"}, "where must be a path or a table of path, type and regex, not {}"),
        ({"where": {"typ": "x"}, "term": "none"}, "where has no 'typ'; write 'type'"),
        ({"where": {"predicate": "x"}, "term": "none"}, "where has no 'predicate'; write"),
        ({"where": {"path": 3}, "term": "none"}, "where.path must be a string, not 3"),
        ({"where": {"regex": "("}, "term": "none"}, "where.regex '(' is no regular expression: missing )"),
        ({"where": {"type": "torch.nn.Liner"}, "term": "none"},
         "where.type 'torch.nn.Liner' is in no module that is loaded; import its module first, or take one of 'torch.nn.Linear'"),
        ({"where": {"type": "antigravity.Net"}, "term": "none"}, "where.type 'antigravity.Net' is in no module that is loaded; import it first"),
        ({"where": {"type": "torch.nn.functional.relu"}, "term": "none"}, "where.type 'torch.nn.functional.relu' is no class of torch.nn.Module"),
        ({"where": {"type": "builtins.eval"}, "term": "none"}, "where.type 'builtins.eval' is no class of torch.nn.Module"),
        ({"where": "a", "term": "Dropout", "p": 0.1, "kind": "os.system"}, "kind 'os.system' is no class of torch.nn.Module"),
        ({"where": "a", "term": "WeightTerm"}, "knows no term 'WeightTerm'"),
        ("L2", "must be a table with where and term, not 'L2'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, table, told):
    with pytest.raises(PolicyError) as caught:
        rules_from_dicts([{"where": "", "term": "none"}, table])
    assert str(caught.value).startswith("rule 2")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"rule": [table]}))
    with pytest.raises(PolicyError, match=re.escape(f"{path}, rule 1")):
        load_rules(path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("r.toml", "[[rule]\n", "is no valid TOML: "),
        ("r.json", "{", "is no valid JSON: "),
        ("r.json", "[]", "must hold [[rule]] tables (in JSON one object with the key 'rule') and nothing else, but has a list."),
        ("r.toml", "", "but has nothing."),
        ("r.toml", "[[rules]]\n", "but has 'rules'."),
        ("r.toml", "[rule]\n", "'rule' must be a list of tables; write [[rule]]."),
        ("r.yaml", "", "A file of rules ends in .toml or .json, not as "),
    ],
)  # fmt: skip
def test_what_is_no_file_of_rules(tmp_path, name, text, told):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(PolicyError) as caught:
        load_rules(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_rules(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("where", "term", "told"),
    [
        (lambda path, m: True, L2(1.0), "is a callable, which a file cannot hold; write a path"),
        (Where("a", predicate=lambda p, m: True), L2(1.0), "is a callable, which a file cannot"),
        ("", Penalty(relu_sum, 1.0), "needs Python code, which a file cannot hold"),
        ("", L2SP(1.0, {}), "an L2SP's reference is tensors, which a file cannot hold"),
    ],
)
def test_what_a_file_cannot_hold(tmp_path, where, term, told):
    path = tmp_path / "rules.toml"
    with pytest.raises(PolicyError, match="rule 2: .*" + re.escape(told)):
        save_rules([("", None), (where, term)], path)
    assert not path.exists()


def test_a_local_class_is_refused():
    class Local(nn.Module):
        pass

    with pytest.raises(PolicyError, match="is not found under its name; define it at the top"):
        rules_to_dicts({Local: L2(1.0)})


def test_reading_imports_nothing(monkeypatch):
    rules_from_dicts([{"where": {"type": "torch.nn.Linear"}, "term": "L2", "strength": 1.0}])
    before = set(sys.modules)

    def never(name, *args, **kwargs):
        raise AssertionError(f"import of {name}")

    monkeypatch.setattr(builtins, "__import__", never)
    rules = rules_from_dicts([{"where": {"type": "torch.nn.Conv2d"}, "term": "none"}])
    with pytest.raises(PolicyError):
        rules_from_dicts([{"where": {"type": "wsgiref.handlers.X"}, "term": "none"}])
    monkeypatch.undo()
    assert rules == [(nn.Conv2d, None)]
    assert set(sys.modules) == before


def test_a_lazy_package_is_not_made_to_import():
    transformers = pytest.importorskip("transformers")
    name = "FNetModel"
    if name in vars(transformers):
        pytest.skip("an earlier test has loaded it")
    with pytest.raises(PolicyError, match="is in no module that is loaded"):
        rules_from_dicts([{"where": {"type": f"transformers.{name}"}, "term": "none"}])
    assert name not in vars(transformers)


def test_writing_toml_without_tomli_w(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomli_w", None)
    with pytest.raises(RegwrapError, match=r"needs the package tomli-w: pip install 'regwrap\[co"):
        save_rules(RULES, tmp_path / "rules.toml")
    save_rules(RULES, tmp_path / "rules.json")
    assert load_rules(tmp_path / "rules.json") == PAIRS


def test_a_list_is_needed():
    with pytest.raises(PolicyError, match="needs a list of mappings, one a rule, not"):
        rules_from_dicts({"rule": []})
