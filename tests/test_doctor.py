"""mlxft doctor, here and on Macs as their programs describe them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxft import device, doctor
from mlxft.doctor import Finding, examine, sound

SAID = {
    "sysctl -n machdep.cpu.brand_string": "Apple M4 Pro",
    "ioreg -rc AGXAccelerator -d 1": '+-o AGXAcceleratorG16X\n    "gpu-core-count" = 20\n',
    "sysctl -n sysctl.proc_translated": "0",
    "sysctl -n vm.swapusage": "total = 2048.00M  used = 812.50M  free = 1235.50M  (encrypted)",
}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A healthy Mac; what its programs print can be changed."""
    said = dict(SAID)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: (said.get("version", "15.5"), ("", "", ""), "arm64"))
    monkeypatch.setattr(platform, "machine", lambda: said.get("machine", "arm64"))
    for module in (device, doctor):
        monkeypatch.setattr(module, "ask", lambda *command: said.get(" ".join(command), ""))
    monkeypatch.setattr(doctor, "in_use", lambda: None)
    for module in (doctor, device):
        monkeypatch.setattr(module, "backend", lambda: said.get("backend", "metal"))
    monkeypatch.setattr("mlx.core.device_info", lambda: {"memory_size": 48e9, "max_recommended_working_set_size": 36e9})
    monkeypatch.setenv(device.WATCHDOG, "1")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=float(said.get("free", "9e10"))))
    return said


def by_name() -> dict[str, Finding]:
    return {f.name: f for f in examine(Path("runs"))}


def test_a_mac_in_order(mac: dict[str, str]) -> None:
    found = by_name()
    assert sound(list(found.values()))
    assert {f.state for f in found.values()} == {"ok"}
    shown = {name: found[name].value for name in ("chip", "GPU cores", "macOS", "MLX computes on", "memory", "swap")}
    assert shown == {
        "chip": "Apple M4 Pro",
        "GPU cores": "20",
        "macOS": "15.5",
        "MLX computes on": "the GPU (Metal)",
        "memory": "48.0 GB",
        "swap": "0.8 GB in use",
    }
    assert found["working set that Metal recommends"].value == "36.0 GB"
    assert found["mlx"].value == importlib.metadata.version("mlx")


@pytest.mark.parametrize(
    ("changed", "name", "state", "mend"),
    [
        ({"sysctl -n sysctl.proc_translated": "1"}, "Python", "wrong", "brew install python"),
        ({"machine": "x86_64"}, "Python", "wrong", "this Python is for Intel"),
        ({"version": "13.6"}, "macOS", "wrong", "update macOS"),
        ({"backend": "cpu"}, "MLX computes on", "wrong", "training needs the GPU"),
        ({"sysctl -n vm.swapusage": "used = 9216.00M"}, "swap", "note", "close some"),
        ({"free": "2e9"}, "free for runs", "note", "free some"),
    ],
)
def test_what_is_not_in_order_is_said_with_what_mends_it(
    changed: dict[str, str], name: str, state: str, mend: str, mac: dict[str, str]
) -> None:
    mac |= changed
    found = by_name()
    assert (found[name].state, mend in found[name].mend) == (state, True), found[name]
    assert sound(list(found.values())) == (state != "wrong")


def test_a_watchdog_that_the_user_keeps(mac: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.WATCHDOG, "0")
    assert by_name()["display watchdog"].state == "note"


def test_an_old_package_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.1" if name == "mlx-lm" else version(name))
    found = by_name()["mlx-lm"]
    assert (found.state, found.mend) == ("wrong", "pip install -U 'mlx-lm>=0.32.2'")


def test_a_program_that_is_not_there_says_nothing() -> None:
    assert device.ask("no-such-program-of-ours") == ""
    assert device.ask(sys.executable, "-c", "raise SystemExit(1)") == ""


def test_the_command(tmp_path: Path) -> None:
    """Its JSON is what an issue report needs, its table says the same; it writes nothing."""
    command = [sys.executable, "-m", "mlxft", "doctor"]
    env = {**os.environ, "COLUMNS": "200"}
    plain = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    found = json.loads(told.stdout)
    assert plain.returncode == told.returncode == (0 if found["sound"] else 1), plain.stderr
    assert all(f["name"] in plain.stdout and f["value"] in plain.stdout for f in found["findings"])
    assert list(tmp_path.iterdir()) == []
