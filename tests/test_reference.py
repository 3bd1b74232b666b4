"""The docstrings render as an API reference, in one command and without a warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import regwrap as rw

MODULES = [
    "regwrap",
    "regwrap.recipes",
    "regwrap.integrations.lightning",
    "regwrap.integrations.transformers",
    "regwrap.integrations.tensorboard",
]


def test_pdoc_renders_every_public_name(tmp_path):
    pytest.importorskip("pdoc")
    tested = str(Path(rw.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "pdoc", "--docformat", "google", "-o", str(tmp_path), *MODULES],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": tested},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    page = (tmp_path / "regwrap.html").read_text()
    for name in rw.__all__:
        assert f'id="{name}"' in page
        assert getattr(rw, name).__doc__
    for module in MODULES[1:]:
        assert (tmp_path / f"{module.replace('.', '/')}.html").exists()
