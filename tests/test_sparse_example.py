"""examples/sparse.py prints what it promises: zeros by attach, tiny ones by hadamard."""

from pathlib import Path

import pytest
from test_examples import PNG, run


@pytest.mark.slow
def test_sparse(tmp_path: Path) -> None:
    output = run("sparse.py", "--steps", 1000, cwd=tmp_path)
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in output.splitlines()]
    found = {(r[0], r[1]): r[2:] for r in rows if len(r) == 7}
    costs = {(r[0], r[1]): r[2:] for r in rows if len(r) == 5}
    assert found.pop(("scikit-learn", ""))[0] == "4"
    optimizers = ("SGD", "momentum", "Adam", "AdamW")
    assert all(found["L1 in the loss", o][:2] == ["0", "no"] for o in optimizers)
    assert all(found["attach", o][:2] == ["4", "yes"] for o in optimizers)
    assert all(found["hadamard", o][:3] == ["0", "no", "4"] for o in ("Adam", "AdamW"))
    assert float(found.pop(("attach", "RMSprop"))[4]) > 0.01
    assert all(float(row[4]) <= 0.01 for row in found.values())
    assert [costs["hadamard", o][2] for o in (*optimizers, "RMSprop")] == ["2", "4", "6", "6", "4"]
    assert [costs["attach", o][2] for o in (*optimizers, "RMSprop")] == ["1", "2", "3", "3", "2"]
    assert (tmp_path / "sparse.png").read_bytes().startswith(PNG)
