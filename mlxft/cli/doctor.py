"""mlxft doctor, mlxft selftest."""

from __future__ import annotations

from pathlib import Path

import click

from mlxft.text import echo, json_text, make_console


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for an issue report.")
def doctor(as_json: bool) -> None:
    """Look at this machine: chip, memory, Python, MLX, disks and extras; say what is wrong and what mends it.

    Exit code 1 if something is wrong. Nothing is computed and nothing is written.

    \b
    Example: mlxft doctor
    """
    from rich.table import Table
    from rich.text import Text

    from mlxft.doctor import examine, sound, to_json

    findings = examine(Path("runs"))
    if as_json:
        echo(json_text(to_json(findings), indent=2))
    else:
        console = make_console()
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        styles = {"ok": "green", "note": "yellow", "wrong": "bold red"}
        for f in findings:
            table.add_row(Text(f.state, styles[f.state]), f.name, Text(f.value))
            if f.mend:
                table.add_row("", "", Text(f"-> {f.mend}"))
        console.print(table)
    if not sound(findings):
        raise SystemExit(1)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for an issue report.")
def selftest(as_json: bool) -> None:
    """Hold what training is made of against float32 on the CPU: operations, SFT, DPO, PPO, resume, fuse, memory.

    It takes a minute or two, downloads nothing, and writes to a temporary folder. Exit code 1 if a check fails.

    \b
    Example: mlxft selftest
    """
    from mlxft.selftest import Check, to_json
    from mlxft.selftest import selftest as run

    console = make_console()

    def tell(check: Check) -> None:
        if not as_json:
            said = check.error or f"{check.found:.1e} of {check.allowed:.1e}"
            state = "ok    " if check.passed else "FAILED"
            console.print(f"{state}  {check.name}: {said}, {check.seconds:.1f} s", soft_wrap=True)

    checks = run(tell)
    if as_json:
        echo(json_text(to_json(checks), indent=2))
    if not all(check.passed for check in checks):
        raise SystemExit(1)
