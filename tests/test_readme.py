"""The README's blocks: its Python runs from top to bottom, and prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = [
    # language, text, number of the line that the text begins on
    (found[1], found[2], README.read_text(encoding="utf-8")[: found.start(2)].count("\n") + 1)
    for found in re.finditer(
        r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]


def test_first_two_bash_blocks_are_the_two_commands():
    (job, job_line), (tests, tests_line) = [
        (text, line) for language, text, line in BLOCKS if language == "bash"
    ][:2]
    assert job.count("\n") == tests.count("\n") == 1
    assert max(job_line, tests_line) <= 60
    assert "examples/quickstart.py" in job
    assert "pytest" in tests


def test_code_stands_by_line_10():
    assert next(line for language, _, line in BLOCKS if language == "python") <= 10


def test_python_blocks_run_and_print_what_they_say(tmp_path, monkeypatch):
    """A text block right after a Python block is that block's output, line by line."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    followed_by = [language for language, *_ in BLOCKS[1:]] + [""]
    compared = 0
    for i, (language, text, line) in enumerate(BLOCKS):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # The blank lines make a traceback point into the README.
            exec(compile("\n" * (line - 1) + text, str(README), "exec"), namespace)
        if followed_by[i] == "text":
            promised = [row.rstrip() for row in BLOCKS[i + 1][1].splitlines()]
            assert [row.rstrip() for row in printed.getvalue().splitlines()] == promised, line
            compared += 1
    assert compared


@pytest.fixture(autouse=True)
def _torch_state():
    """A reader's top-level code seeds and sets threads; the other tests keep theirs."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield
