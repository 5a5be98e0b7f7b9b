"""The command ``fisedit``."""

from fisedit_compiler.cli.commands import INTERRUPTED, USER_ERROR, app, main

__all__ = ["INTERRUPTED", "USER_ERROR", "app", "main"]
