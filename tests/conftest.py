"""Takes from the environment what a developer's shell has and a new user's has not.

The commands that tests start then behave as they do for users: with PYTHONUNBUFFERED set, say, a
stdout that cannot be written does not change a program's exit code.
"""

from __future__ import annotations

import os

PREFIXES = ("PYTHON", "LC_", "MPL")
NAMES = ("LANG", "LANGUAGE", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "PAGER")

for name in list(os.environ):
    if name.startswith(PREFIXES) or name in NAMES:
        del os.environ[name]
