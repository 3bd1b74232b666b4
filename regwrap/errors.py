"""What regwrap raises and warns with."""

_ENOUGH = 80


class RegwrapError(Exception):
    """The root of every error of regwrap."""


class UnmatchedRule(RegwrapError, LookupError):
    """A rule reaches nothing in the model."""


class PolicyError(RegwrapError, ValueError):
    """A rule, or the site it reaches, cannot be carried out."""


class RegwrapWarning(UserWarning):
    """The category of everything that regwrap only warns about."""


def brief(value: object) -> str:
    """The repr of a value on one line of bearable length: a model's is a page."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _ENOUGH else f"{text[: _ENOUGH - 3]}..."
