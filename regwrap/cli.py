"""The shell: `python -m regwrap show | verify | doctor | diff package.module:factory`."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from regwrap import config, difference, figures, penalty, table
from regwrap.api import policy, regularize, sheet, summary, unregularize
from regwrap.findings import doctor

FINE, FOUND, FAILED = 0, 1, 2
"""Exit status: all is well; findings, a failed check, a difference; the work was not done."""

Rows = list[dict[str, Any]]


class _Failure(Exception):
    """What kept the command from doing its work, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; errors go to standard error, in one line."""
    try:
        options = _parser().parse_args(arguments)
        with _one_line_warnings():
            return int(options.run(options))
    except _Failure as failure:
        print(f"regwrap: {failure}", file=sys.stderr)
    except BrokenPipeError:
        # `| head` has read enough; without this the interpreter complains when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    return FAILED


# --- the command line ----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Bad usage, in one line: argparse would print the usage before it."""
        raise _Failure(f"{message}; see {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="regwrap", description="What regularizes a model, from the shell.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = _command(commands, "show", _show, "print the policy table")
    show.add_argument("--values", action="store_true", help="norms and penalties besides")
    show.add_argument("--html", metavar="FILE", type=Path, help="write the table as a page, too")
    check = _command(commands, "verify", _verify, "check regwrap's guarantees on the model")
    check.add_argument(
        "--shape",
        action="append",
        type=_shape,
        default=[],
        metavar="1,784",
        help="of a random input; several for several inputs, 1,16:int64 for token ids",
    )
    _command(commands, "doctor", _doctor, "find what does not do what it looks like")
    diff = _command(commands, "diff", _diff, "compare with what 'show --json' wrote before")
    diff.add_argument("before", metavar="ROWS.json", type=Path)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], what: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    parser.add_argument(
        "target",
        metavar="package.module:factory",
        help="a model, or a function without arguments that returns one (or a model and its "
        "optimizer)",
    )
    parser.add_argument("--rules", metavar="FILE", type=Path, help=".toml or .json, applied first")
    parser.add_argument("--json", action="store_true", help="plain data instead of a table")
    parser.set_defaults(run=run)
    return parser


def _shape(text: str) -> torch.Tensor:
    """`1,784` as a random tensor, `1,16:int64` as one of small whole numbers."""
    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{name!r} is no dtype of torch; write 1,16:int64")
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write 1,784") from None
    draw = torch.Generator().manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=draw)
    return torch.randint(0, 2, shape, dtype=dtype, generator=draw)


# --- the commands --------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    model, optimizer = _load(options)
    if options.html is not None:
        page = _page(sheet(model, optimizer=optimizer, values=options.values), options.target)
        with _attempt(f"{options.html} cannot be written"):
            options.html.write_text(page, encoding="utf-8")
    if options.json:
        _print_json(_with_values(model) if options.values else policy(model).rows())
    else:
        summary(model, optimizer=optimizer, values=options.values)
    return FINE


def _page(shown: table.Sheet, target: str) -> str:
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>regwrap: {target}</title></head>\n<body>{table.html(shown)}</body></html>\n"
    )


def _with_values(model: nn.Module) -> Rows:
    """The rows with the norm of each site and all its penalties besides."""
    in_force = policy(model)
    values = figures.values(model, in_force)
    rows = in_force.rows()
    for row in rows:
        norm2, now = values.get((row["path"], row["site"]), (None, None))
        row |= {"norm2": norm2, "penalty": now}
    return rows


def _verify(options: argparse.Namespace) -> int:
    try:
        from regwrap.trust import verify  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise _Failure("this version of regwrap has no verify.") from None
    model, _ = _load(options)
    with _attempt("the plain model does not run; give its inputs' shapes with --shape"):
        _run_plain(model, options.shape)
    with _attempt("verify could not run"):
        report = verify(model, *options.shape)
    if options.json:
        _print_json([dataclasses.asdict(check) for check in report.checks])
    else:
        rows = [(c.name, "ok" if c.ok else "FAILED", c.detail) for c in report.checks]
        table.show_list(("check", "", "detail"), rows)
    return FINE if report.ok else FOUND


def _run_plain(model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """An input that the plain model does not take says nothing about the guarantees."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        unregularize(copy.deepcopy(model)).eval()(*inputs)


def _doctor(options: argparse.Namespace) -> int:
    model, optimizer = _load(options)
    findings = doctor(model, optimizer)
    if options.json:
        _print_json([dataclasses.asdict(finding) for finding in findings])
    elif not findings:
        print("nothing found")
    else:
        for finding in findings:
            print(f"{finding.severity}: {finding.message} [{finding.code}]\n    {finding.fix}")
    return FOUND if findings else FINE


def _diff(options: argparse.Namespace) -> int:
    with _attempt(f"{options.before} is not what 'regwrap show --json' writes"):
        before = _rows_of(options.before)
    model, _ = _load(options)
    changes = difference.compare(before, policy(model).rows())
    if options.json:
        _print_json([dataclasses.asdict(change) for change in changes])
    elif not changes:
        print("no difference")
    else:
        rows = [(c.change, c.path, c.term or "", c.detail) for c in changes]
        table.show_list(("", "site", "terms", "detail"), rows)
    return FOUND if changes else FINE


def _rows_of(path: Path) -> Rows:
    rows = json.loads(path.read_text(encoding="utf-8"))
    keys = {"path", "layer", "shape", "parameters", "term", "site", "mechanism"}
    if not isinstance(rows, list) or not all(isinstance(r, dict) and keys <= set(r) for r in rows):
        raise ValueError("it must be a list of rows")
    return rows


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


# --- the model -----------------------------------------------------------------------------------


def _load(options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """The model that the target makes, regularized by the file of rules if there is one."""
    rules = None
    if options.rules is not None:
        module = options.target.partition(":")[0]
        with _attempt(f"{module} cannot be imported"), _quiet_output():
            _import(module)  # first: the rules may name its classes
        with _attempt(f"the rules of {options.rules} cannot be read"):
            rules = config.load_rules(options.rules)
    with _attempt(f"{options.target} does not make a model"), _quiet_output():
        model, optimizer = _made(options.target)
    if rules is not None:
        with _attempt(f"the rules of {options.rules} cannot be applied"):
            regularize(model, rules)
    with _attempt(f"the policy of {options.target} cannot be read"):
        penalty.settled(model)
    return model, optimizer


def _made(target: str) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    module, _, name = target.partition(":")
    if not name:
        raise ValueError("write package.module:factory")
    made: Any = _import(module)
    for part in name.split("."):
        made = getattr(made, part)
    if not isinstance(made, nn.Module):
        made = made()
    model, optimizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"it gives {type(made).__name__}, no nn.Module")
    return model, optimizer


def _import(module: str) -> Any:
    # The console script has its own folder there, where `python -m` has the current one.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(module)


@contextlib.contextmanager
def _attempt(what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line that begins with what was attempted."""
    try:
        yield
    except _Failure:
        raise
    except (Exception, SystemExit) as error:  # a factory may end the process, too
        told = " ".join(str(error).split())
        raise _Failure(f"{what}: {type(error).__name__}: {told}") from None


@contextlib.contextmanager
def _quiet_output() -> Iterator[None]:
    """What a factory prints goes to standard error: standard output is for the command's own."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        print(f"regwrap: {category.__name__}: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
