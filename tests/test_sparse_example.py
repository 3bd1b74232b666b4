"""examples/sparse.py prints what it promises: zeros by attach, none by the loss."""

from pathlib import Path

import pytest
from test_examples import PNG, run


@pytest.mark.slow
def test_sparse(tmp_path: Path) -> None:
    output = run("sparse.py", "--steps", 1000, cwd=tmp_path)
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in output.splitlines()]
    found = {(r[0], r[1]): r[2:4] for r in rows if len(r) == 7}
    assert found.pop(("scikit-learn", ""))[0] == "4"
    optimizers = ("SGD", "momentum", "Adam", "AdamW")
    assert all(found["L1 in the loss", o] == ["0", "no"] for o in optimizers)
    assert all(found["attach", o] == ["4", "yes"] for o in optimizers)
    assert (tmp_path / "sparse.png").read_bytes().startswith(PNG)
