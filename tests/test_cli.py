# ruff: noqa: E501 a message stands on one line, as it is printed
"""The shell: what it prints, where, and with which exit status."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import regwrap as rw
from regwrap import L2, Dropout, save_rules
from regwrap.cli import main
from regwrap.difference import compare

MODELS = """
import sys
import torch
from torch import nn
import regwrap as rw

print("a factory that talks")


class Net(nn.Module):
    def __init__(self, names=("fc1", "fc2", "head")):
        super().__init__()
        for name, size in zip(names, (8, 8, 3)):
            setattr(self, name, nn.Linear(8, size))

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def plain():
    return Net()


def ruled():
    print("and talks on")
    return rw.regularize(Net(), {"": rw.L2(1e-4)})


def renamed():
    return Net(("fc1", "dense", "head"))


def decayed():
    model = rw.regularize(Net(), rw.L2(1e-4))
    return model, torch.optim.SGD(model.parameters(), weight_decay=0.1)


class Twisted(Net):
    def forward(self, x):
        return super().forward(x) + hasattr(self, "reg_loss")


def twisted():
    return rw.regularize(Twisted(), rw.L2(1e-4))


def broken():
    raise KeyError("no\\nsuch thing")


def leaving():
    sys.exit(3)


def nothing():
    return 42


model = plain()
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A module that no other test has imported, in the current folder."""
    name = f"models_{abs(hash(tmp_path)):x}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_show(capsys, target):
    status, out, err = run(capsys, "show", f"{target}:ruled")
    assert status == 0
    assert "fc{1..2} x2  Linear  8x8    L2(0.0001)" in out
    assert "talks" not in out
    assert err == "a factory that talks\nand talks on\n"


def test_show_json_and_values(capsys, target):
    status, out, _ = run(capsys, "show", f"{target}:ruled", "--json")
    shown = json.loads(out)
    expected = rw.policy(sys.modules[target].ruled()).rows()
    capsys.readouterr()
    assert status == 0
    assert shown == json.loads(json.dumps(expected))
    status, out, _ = run(capsys, "show", f"{target}:ruled", "--json", "--values")
    assert json.loads(out)[0]["penalty"] > 0
    status, out, _ = run(capsys, "show", f"{target}:ruled", "--values")
    assert "reg_loss = " in out


def test_show_html(capsys, target, tmp_path):
    status, out, _ = run(capsys, "show", f"{target}:ruled", "--html", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert status == 0
    assert page.startswith("<!doctype html>")
    assert "L2(0.0001)" in page
    assert "L2(0.0001)" in out


@pytest.mark.parametrize("what", ["decayed", "plain"])
def test_the_html_page_shows_what_the_terminal_does(capsys, target, tmp_path, what):
    _, out, _ = run(capsys, "show", f"{target}:{what}", "--values", "--html", "page.html")
    page = html.unescape(re.sub("<[^>]*>", "", (tmp_path / "page.html").read_text()))
    lines = [line.strip() for line in out.splitlines() if line.strip() and "talks" not in line]
    assert len(lines) > 4
    assert [line for line in lines if line not in page] == []


def test_rules_and_a_module_in_place_of_a_factory(capsys, target, tmp_path):
    save_rules({"fc1": L2(0.5), "head": Dropout(0.1)}, tmp_path / "rules.toml")
    for what in ("plain", "Net", "model"):
        status, out, _ = run(capsys, "show", f"{target}:{what}", "--rules", "rules.toml")
        assert status == 0
        assert "L2(0.5)" in out
        assert "Dropout(0.1)" in out


def test_rules_of_the_module_s_own_class(capsys, target, tmp_path):
    rule = {"where": {"type": f"{target}.Net"}, "term": "L2", "strength": 0.5}
    (tmp_path / "rules.json").write_text(json.dumps({"rule": [rule]}))
    status, out, _ = run(capsys, "show", f"{target}:plain", "--rules", "rules.json")
    assert status == 0
    assert out.count("L2(0.5)") == 3  # two fc, the head, the rule


def test_show_a_plain_model_with_its_optimizer(capsys, target):
    status, out, _ = run(capsys, "show", f"{target}:decayed")
    assert status == 0
    assert "weight decay" in out


def test_doctor(capsys, target):
    status, out, _ = run(capsys, "doctor", f"{target}:plain")
    assert (status, out) == (0, "nothing found\n")
    status, out, _ = run(capsys, "doctor", f"{target}:decayed")
    assert status == 1
    assert out.startswith("warning: fc1.weight and 2 more: shrunk twice, by L2(0.0001) in the loss")
    assert "[l2-twice]\n    Keep one: " in out
    status, out, _ = run(capsys, "doctor", f"{target}:decayed", "--json")
    assert status == 1
    assert json.loads(out)[0]["code"] == "l2-twice"
    status, out, _ = run(capsys, "doctor", f"{target}:plain", "--json")
    assert (status, json.loads(out)) == (0, [])


def test_verify(capsys, target):
    if not hasattr(rw, "verify"):
        status, _, err = run(capsys, "verify", f"{target}:plain")
        assert (status, err) == (2, "regwrap: this version of regwrap has no verify.\n")
        pytest.skip("verify is not built on this branch")
    status, out, _ = run(capsys, "verify", f"{target}:ruled", "--shape", "2,8")
    assert status == 0
    assert "FAILED" not in out
    status, out, _ = run(capsys, "verify", f"{target}:ruled", "--shape", "2,8", "--json")
    assert {"name", "ok", "detail"} == set(json.loads(out)[0])
    assert max(map(len, out.splitlines())) > 80  # no terminal: not wrapped


@pytest.mark.parametrize("shape", [[], ["--shape", "2,9"]])
def test_verify_with_an_input_that_the_plain_model_does_not_take(capsys, target, shape):
    status, out, err = run(capsys, "verify", f"{target}:ruled", *shape)
    told = err.splitlines()[-1]
    assert (status, out) == (2, "")
    assert told.startswith("regwrap: the plain model does not run; give its inputs' shapes with")


def test_verify_of_a_model_that_breaks_a_guarantee(capsys, target):
    status, out, _ = run(capsys, "verify", f"{target}:twisted", "--shape", "2,8")
    assert status == 1
    assert "FAILED" in out


def test_diff(capsys, target, tmp_path):
    rules = {"{fc1,fc2,dense}": L2(0.1), "head": Dropout(0.1)}
    save_rules(rules, tmp_path / "rules.toml")
    _, rows, _ = run(capsys, "show", f"{target}:plain", "--rules", "rules.toml", "--json")
    (tmp_path / "rows.json").write_text(rows)
    status, out, _ = run(capsys, "diff", f"{target}:plain", "rows.json", "--rules", "rules.toml")
    assert (status, out) == (0, "no difference\n")
    status, out, _ = run(capsys, "diff", f"{target}:renamed", "rows.json", "--rules", "rules.toml")
    assert status == 1
    assert "renamed  dense.weight  L2(0.1)  was fc2.weight" in out
    status, out, _ = run(
        capsys, "diff", f"{target}:renamed", "rows.json", "--rules", "rules.toml", "--json"
    )
    assert [c["change"] for c in json.loads(out)] == ["renamed"]
    save_rules({"fc1": L2(0.2), "head": Dropout(0.1)}, tmp_path / "rules.toml")
    status, out, _ = run(capsys, "diff", f"{target}:plain", "rows.json", "--rules", "rules.toml")
    lines = [line.split(maxsplit=2) for line in out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [
        ["lost", "fc2.weight"], ["new", "fc2"], ["changed", "fc1.weight"]
    ]  # fmt: skip
    assert "fc2 is there, no rule reaches it so" in out
    assert "term L2(0.1) -> L2(0.2)" in out


class Old(nn.Module):
    """One layout of an architecture."""

    def __init__(self, stem="blocks", fc=("fc1", "fc2"), depth=3, head="head"):
        super().__init__()
        blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            for name in fc:
                setattr(block, name, nn.Linear(8, 8))
            blocks.append(block)
        setattr(self, stem, blocks)
        setattr(self, head, nn.Linear(8, 3))


def rows(model, rules):
    return json.loads(json.dumps(rw.plan(model, rules).rows()))


def test_two_layouts_of_one_architecture():
    """Timm's names against others: every site is found again, under its new name."""
    old = rows(Old(), {nn.Linear: L2(1e-4)})
    new = Old("layers", ("intermediate", "output"), 4, "classifier")
    changes = compare(old, rows(new, {nn.Linear: L2(1e-4)}))
    renamed = {c.was: c.path for c in changes if c.change == "renamed"}
    assert renamed["head.weight"] == "classifier.weight"
    for i in range(3):
        pair = {renamed[f"blocks.{i}.fc{j}.weight"] for j in (1, 2)}
        assert pair == {f"layers.{i}.intermediate.weight", f"layers.{i}.output.weight"}
    assert {c.path for c in changes if c.change == "new"} == {
        "layers.3.intermediate.weight", "layers.3.output.weight"
    }  # fmt: skip
    assert not [c for c in changes if c.change in ("lost", "changed")]


def test_a_layout_that_loses_sites_without_a_word():
    rules = {"blocks.*.fc1": L2(1e-4), "blocks.*.fc2": Dropout(0.1)}
    old = rows(Old(), rules)
    new = Old(fc=("fc1", "proj"))
    changes = compare(old, rows(new, {"blocks.*.fc1": L2(1e-4)}))
    assert [(c.change, c.path) for c in changes if c.change == "lost"] == [
        ("lost", f"blocks.{i}.fc2:call") for i in range(3)
    ]
    assert {(c.path, c.detail) for c in changes if c.change == "new"} == {
        (f"blocks.{i}.proj", "no rule reaches it") for i in range(3)
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["shwo", "x:y"], "invalid choice: 'shwo'"),
        (["show"], "the following arguments are required: package.module:factory"),
        (["show", "no_such_module:f"], "no_such_module:f does not make a model: ModuleNotFoundError: No module named 'no_such_module'"),
        (["show", "M"], "M does not make a model: ValueError: write package.module:factory"),
        (["show", "M:missing"], "M:missing does not make a model: AttributeError: "),
        (["show", "M:broken"], "M:broken does not make a model: KeyError: 'no\\nsuch thing'"),
        (["doctor", "M:leaving"], "M:leaving does not make a model: SystemExit: 3"),
        (["show", "M:nothing"], "M:nothing does not make a model: TypeError: it gives int, no nn.Module"),
        (["show", "M:plain", "--rules", "none.toml"], "the rules of none.toml cannot be read: FileNotFoundError: "),
        (["show", "M:plain", "--rules", "bad.json"], "the rules of bad.json cannot be read: PolicyError: bad.json, rule 1: knows no term 'L3'"),
        (["show", "M:plain", "--rules", "unmatched.json"], "the rules of unmatched.json cannot be applied: UnmatchedRule: Rule 0 ('haed': L2(1.0)) matches nothing in Net; the nearest names are 'head'"),
        (["show", "M:plain", "--html", "no/such/folder.html"], "no/such/folder.html cannot be written: FileNotFoundError"),
        (["diff", "M:plain", "none.json"], "none.json is not what 'regwrap show --json' writes: FileNotFoundError"),
        (["diff", "M:plain", "bad.json"], "bad.json is not what 'regwrap show --json' writes: ValueError: it must be a list of rows"),
        (["verify", "M:plain", "--shape", "1,a"], "'1,a' is no shape; write 1,784"),
        (["verify", "M:plain", "--shape", "1:flaot"], "'flaot' is no dtype of torch; write 1,16:int64"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_status_2(capsys, target, tmp_path, arguments, told):
    for name, where, term in (("bad", "a", "L3"), ("unmatched", "haed", "L2")):
        rule = {"where": where, "term": term, "strength": 1.0}
        (tmp_path / f"{name}.json").write_text(json.dumps({"rule": [rule]}))
    status, out, err = run(
        capsys, *(a.replace("M", target, 1) if a[0] == "M" else a for a in arguments)
    )
    (line,) = [x for x in err.replace(target, "M").splitlines() if x.startswith("regwrap: ")]
    assert status == 2
    assert not out
    assert told in line


def test_the_real_command(target, tmp_path):
    """As a user types it: the current folder is found, the exit status comes out."""

    tested = str(Path(rw.__file__).parent.parent)

    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": tested},
        )  # fmt: skip

    done = call("-m", "regwrap", "doctor", f"{target}:decayed")
    assert done.returncode == 1
    assert "shrunk twice" in done.stdout
    done = call("-m", "regwrap", "show", f"{target}:broken")
    assert done.returncode == 2
    assert done.stderr.count("Traceback") == 0
    done = call("-m", "regwrap", "--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("show", "verify", "doctor", "diff"))
    script = "import sys; sys.path.pop(0); from regwrap.cli import main; sys.exit(main())"
    done = call("-c", script, "show", f"{target}:plain")  # the console script has no '' in its path
    assert done.returncode == 0, done.stderr
