"""What regwrap raises and warns with."""


class RegwrapError(Exception):
    """The root of every error of regwrap."""


class UnmatchedRule(RegwrapError, LookupError):
    """A rule reaches nothing in the model."""


class PolicyError(RegwrapError, ValueError):
    """A rule, or the site it reaches, cannot be carried out."""


class RegwrapWarning(UserWarning):
    """The category of everything that regwrap only warns about."""
