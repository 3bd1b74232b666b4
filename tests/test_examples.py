"""The examples run as a user runs them, smaller, and print what they promise."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG = b"\x89PNG"


def run(name: str, *arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def cells(output: str, row: str) -> list[float]:
    """The first number of each cell of a table's row."""
    line = next(line for line in output.splitlines() if line.lstrip("│ ").startswith(row + " "))
    return [float(re.search(r"[-+.\de]+", cell)[0]) for cell in line.split("│")[2:-1]]


def assert_quickstart(output: str, picture: Path) -> None:
    for term in ("L2(0.003)", "Dropout(0.5)", "L2(0.0003)"):
        assert term in output  # the policy table
    plain, ruled = cells(output, "plain"), cells(output, "with three rules")
    gain = re.search(r"gain (-?[\d.]+)", output)
    assert len(plain) == len(ruled) == 3
    assert all(0 <= accuracy <= 100 for accuracy in plain + ruled)
    assert float(gain[1]) == pytest.approx(ruled[1] - plain[1], abs=0.11)  # of rounded figures
    assert picture.read_bytes().startswith(PNG)


def test_quickstart_on_digits(tmp_path):
    output = run("quickstart.py", "--seeds", 2, "--epochs", 3, cwd=tmp_path)
    assert "200 training images, 20% wrong labels, 3 epochs, 2 seeds" in output
    assert_quickstart(output, tmp_path / "quickstart.png")


@pytest.mark.slow
def test_quickstart_gains_what_the_readme_says(tmp_path):
    output = run("quickstart.py", "--seeds", 3, cwd=tmp_path)
    assert cells(output, "with three rules")[1] - cells(output, "plain")[1] > 4
    assert "ahead on 3 of 3 seeds" in output


def test_quickstart_on_idx_files(tmp_path):
    pixels = np.random.default_rng(0)
    for name, n in (("train", 2100), ("t10k", 50)):
        images = bytes(16) + pixels.integers(256, size=n * 784, dtype=np.uint8).tobytes()
        labels = bytes(8) + bytes(i % 10 for i in range(n))
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 1))
    picture = tmp_path / "curves.png"
    output = run(
        "quickstart.py", "--data", tmp_path, "--seeds", 1, "--epochs", 2, "--out", picture,
        cwd=tmp_path,
    )  # fmt: skip
    assert "2,000 training images" in output
    assert_quickstart(output, picture)


def test_per_layer_spellings_agree(tmp_path):
    output = run("per_layer.py", "--steps", 30, cwd=tmp_path)
    assert "equal numbers at every one" in output
    for step in ("1", "30"):
        loss, hidden, predict, total = cells(output, step)
        assert loss + hidden + predict == pytest.approx(total, abs=2e-4)
        assert min(loss, hidden, predict) > 0
    assert all(term in output for term in ("L1(0.003)", "L2(0.1)", "WeightDecay(0.01)"))


def test_weight_decay_shrinks_the_norm_either_way(tmp_path):
    output = run("weight_decay.py", "--seeds", 2, cwd=tmp_path)
    plain, penalty, decay = (cells(output, row) for row in ("lambda 0", "L2(3)", "WeightDecay(3)"))
    assert plain[0] > 10 > 1 > penalty[0]  # the norm: about 13.7 and .37
    assert plain[2] > 50 > 1 > penalty[2]  # the test loss: about 88 and .08
    assert decay == pytest.approx(penalty, rel=1e-2)
    assert float(re.search(r"at most (\S+)", output)[1]) < 1e-6
    assert (tmp_path / "weight_decay.png").read_bytes().startswith(PNG)
