"""Python in a process of its own, for what cannot be tested in this one."""

from __future__ import annotations

import subprocess
import sys


def python(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """What `python *arguments` printed, after it ended with 0; `options` are those of subprocess.run."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done
