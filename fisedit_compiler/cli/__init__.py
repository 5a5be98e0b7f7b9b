"""The command ``fisedit``.

What lives here: its subcommands, how their options become calls, and what they print. No work is done here: each
command calls the room whose work it is. May import ``evaluation`` and the rooms below.
"""

from fisedit_compiler.cli.commands import INTERRUPTED, USER_ERROR, app, main

__all__ = ["INTERRUPTED", "USER_ERROR", "app", "main"]
