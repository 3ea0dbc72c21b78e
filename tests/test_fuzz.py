"""A sample of what `make fuzz` runs at length."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_hostile_folders_recipes_and_rows() -> None:
    """No traceback, no hang, no memory without bounds, nothing outside; in a process of its own, which forks."""
    script = Path(__file__).with_name("fuzz.py")
    args = ["--folders", "10", "--recipes", "10", "--rows", "10", "--seed", "1"]
    done = subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("10 cases") == 3
