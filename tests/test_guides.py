"""The guides run as a user runs them: the tour, the examples of people's issues, the pictures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import regwrap as rw

ROOT = Path(rw.__file__).parent.parent
EXAMPLES = ROOT / "examples"
PNG = b"\x89PNG"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def run(name, *arguments, cwd):
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_benefit_writes_its_table_and_pictures(tmp_path):
    output = run("benefit.py", "--seeds", 2, "--epochs", 2, "--out", tmp_path, cwd=tmp_path)
    table = (tmp_path / "benefit_digits.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert table.startswith("digits: 200 training images, 20% of the labels wrong, 2 epochs, 2")
    assert [row.split("|")[1].strip("` ") for row in rows[1:]] == [
        "none", "L2(0.01)", "L1(0.001)", "ElasticNet(0.006, 0.1)", "WeightDecay(3)", "Dropout(0.5)"
    ]  # fmt: skip
    assert all(row in output for row in rows)
    for name in ("benefit_digits.png", "weights_digits.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


@pytest.mark.slow
def test_benefit_gains_what_the_readme_says(tmp_path):
    run("benefit.py", "--seeds", 3, "--out", tmp_path, cwd=tmp_path)
    rows = (tmp_path / "benefit_digits.md").read_text().splitlines()
    gains = [float(row.split("|")[3].split()[0]) for row in rows if row.startswith("| `")]
    assert len(gains) == 5
    assert min(gains) > 2
    assert max(gains) > 5


def test_uncertainty(tmp_path):
    output = run("uncertainty.py", "--seeds", 1, "--epochs", 2, cwd=tmp_path)
    assert "no reliable detector" in output
    assert "turned by 90 degrees" in output
    assert (tmp_path / "uncertainty.png").read_bytes().startswith(PNG)


def test_the_table_as_a_picture(tmp_path):
    run("table_svg.py", "--out", tmp_path / "policy.svg", cwd=tmp_path)
    drawn = texts_of(tmp_path / "policy.svg")
    for text in ("WeightDecay(0.05)", "Dropout(0.1)", "blocks.{0..11}.norm"):
        assert text in drawn
    assert texts_of(EXAMPLES / "policy.svg") == drawn  # else run it again: the table has changed


def texts_of(svg):
    """The words of a picture: its styles may differ with the version of rich."""
    return " ".join(
        re.sub(r"<style.*?</style>|<[^>]*>|&#160;", " ", svg.read_text(), flags=re.S).split()
    )


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_the_readme_shows_what_benefit_wrote(name):
    assert (EXAMPLES / f"benefit_{name}.md").read_text() in (ROOT / "README.md").read_text()


def test_the_pictures_of_the_readme_are_there():
    shown = re.findall(r"!\[.+?\]\((.+?)\)", (ROOT / "README.md").read_text())
    assert len(shown) >= 4
    assert all((ROOT / path).is_file() for path in shown)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Jupyter's own
def test_the_tour(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept clean in git
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=300, resources=resources)
    client.execute(env=ENVIRONMENT)
    texts = [text_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert any("L2(0.003), Dropout(0.5)" in text for text in texts)
    assert any("Rule 0 ('block': L2(0.001)) matches nothing in Net" in text for text in texts)
    assert any("shrunk twice" in text for text in texts)
    scores = next(text for text in texts if "with rules   0." in text)
    plain, ruled = map(float, re.findall(r"0\.\d{3}", scores))
    assert ruled > plain
    assert "no policy: this is what regularizes the model of its own" in texts[-1]


def text_of(cell):
    """What a cell printed, and its result as text."""
    found = ""
    for output in cell.get("outputs", ()):
        assert output.output_type != "error"
        found += output.get("text", "") + output.get("data", {}).get("text/plain", "")
        found += output.get("data", {}).get("text/html", "")
    return found
