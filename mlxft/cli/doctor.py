"""mlxft doctor, mlxft selftest, mlxft bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@click.command()
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option("--shape", default="smollm2-135m", show_default=True, help="Of the model; its weights are random.")
@click.option("--steps", default=8, show_default=True, type=click.IntRange(2, 1000), help="Counted ones of each job.")
@click.option("--against", type=click.Choice(["mlx_lm"]), help="It takes a turn behind each job that it does.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(jobs: tuple[str, ...], shape: str, steps: int, against: str | None, as_json: bool) -> None:
    """Time this machine: SFT by LoRA and QLoRA, plain, packed and checkpointed, DPO, GRPO, PPO, and sampling.

    JOB is one of sft-lora, sft-lora-packed, sft-lora-checkpointed, sft-qlora, dpo, grpo, ppo, sampling; default: all.
    --shape takes smollm2-135m, qwen3-0.6b, qwen2.5-1.5b, llama-3.2-3b or qwen3-8b. Nothing is downloaded; the rows at
    the end are for docs/performance.md. Exit code 1 if a job fails.

    \b
    Example: mlxft bench --shape qwen3-0.6b --against mlx_lm
             mlxft bench sft-qlora --shape llama-3.2-3b
    """
    from mlxft.bench import JOBS, markdown
    from mlxft.bench import bench as run

    console = make_console()

    def tell(found: dict[str, Any]) -> None:
        if as_json:
            return
        said = found.get("error") or f"{found['tokens_per_s']:.0f} tokens/s, {found['peak_gb']:.2f} GB"
        more = f", {found['share']:.0%} of the machine's products" if "share" in found else ""
        more += f", {found['sampled_per_s']:.0f} sampled/s" if "sampled_per_s" in found else ""
        console.print(f"{found['side']:>6}  {found['job']}: {said}{more}", soft_wrap=True)

    found = run(jobs or tuple(JOBS), shape, steps, against is not None, tell)
    if as_json:
        echo(json_text(found, indent=2))
    else:
        command = " ".join(
            ["mlxft bench", *jobs, f"--shape {shape} --steps {steps}", *(["--against mlx_lm"] if against else [])]
        )
        echo("\n".join(["", *markdown(found, command)]))
    if any("error" in job for job in found["jobs"]):
        raise SystemExit(1)
