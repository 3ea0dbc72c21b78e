"""Hostile folders, recipes and rows through the commands, each in a process of its own under limits.

    python tests/fuzz.py --folders 100 --recipes 1000 --rows 1000 --seed 0

What must not be: a traceback, more than 10 seconds or 2 GB, an end by a signal, an open file outside of the case's
folder and what it names, anything written or removed outside, a recipe that check accepts and train refuses. The same
seed gives the same cases.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

sys.path.insert(0, str(Path(__file__).parent))

SECONDS, BYTES = 10.0, 2 << 30
ENOUGH = 4.0  # seconds of training, before Ctrl-C
DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
NASTY: list[Any] = [
    None,
    "",
    "\0",
    "\ud800",
    "a" * 300,
    "..",
    "../outside/secret.txt",
    "/dev/zero",
    "~noone",
    "010",
    "yes",
]
NASTY += [
    0,
    -1,
    1.5,
    2**31,
    10**8,
    10**12,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    True,
    [],
    {},
    [[]],
    [None],
    DEEP,
]
NASTY += [
    {"$ref": "#"},
    {"a": {"b": []}},
    ["x"] * 1000,
    "{{ 'a' * 10**10 }}",
    "\x1b[2J",
    "é" * 90,
    "!!python/object:os.system",
]
LIKELY: list[Any] = [0, 1, 2, 3, 5, 0.1, 0.5, 1e-4, True, False, "auto", "none", "m", "rows.jsonl", "1h", ["the"], [4]]
LINES = [b"%c: &%c [%s]" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(12)]
TEXTS = [b"", b"\xff\xfe", b"- a", b"a: &a [*a]", b"? [a]: b", b"a: [" * 5000, b"\0" * 100]
TEXTS += [b"x: !!python/object:os.system {}", b"\n".join([b"a: &a [1,1,1,1,1,1,1,1,1]", *LINES])]
CHAT = {"messages": [{"role": "user", "content": "the in"}, {"role": "assistant", "content": "on"}]}
ROWS = {
    "messages": CHAT,
    "text": {"text": "the in on"},
    "prompt-completion": {"prompt": "the", "completion": "in on"},
    "preference": {"prompt": "the", "chosen": "in", "rejected": "on"},
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        at = todo.pop()
        for key in list(at) if isinstance(at, dict) else range(len(at)):
            found.append((at, key))
            if isinstance(at[key], dict | list):
                todo.append(at[key])
    return found


def damaged(value: Any, rng: random.Random) -> Any:
    """A copy of a value in which one or two parts are something else."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 2)):
        if found := places(value):
            at, key = rng.choice(found)
            if rng.random() < 0.1:
                del at[key]
            else:
                at[key] = json.loads(json.dumps(rng.choice(NASTY)))  # a copy: it may be damaged itself
    return value


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(3)
    if kind == 0:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 1:
        changed = bytearray(data or b"x")
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(min(len(changed), 4096))] = rng.randrange(256)
        return bytes(changed)
    return rng.choice(TEXTS)


def damage_file(file: Path, rng: random.Random) -> None:
    """Make of a file something else: changed, cut, a link, a folder, a pipe."""
    kind = rng.random()
    if kind < 0.5 and file.suffix == ".json":
        file.write_text(json.dumps(damaged(json.loads(file.read_text("utf-8")), rng)), "utf-8")
    elif kind < 0.8:
        file.write_bytes(damaged_bytes(file.read_bytes(), rng))
    else:
        file.unlink()
        make = [file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to(".")]
        rng.choice(make)()


FORMS = {"sft": "messages", "preference": "preference", "reward": "preference"}
FORMS |= dict.fromkeys(("ppo", "grpo", "rloo", "reinforce", "online_dpo"), "prompts")


def settings(data: str, form: str, objective: str | None = None) -> dict[str, Any]:
    objective = objective or ("preference" if form == "preference" else "sft")
    made: dict[str, Any] = {"model": {"path": "m"}, "tune": {"rank": 2}, "data": {"train": data, "format": form}}
    return {"objective": objective, **made, "batch": {"rows": 2}, "run": {"name": "a", "steps": 2, "seed": 1}}


DAMAGED = (".json", ".jsonl", ".safetensors", ".yaml", ".jinja")
ASK = "--max-tokens 2 the"
OPENED = {
    "m": ["check r.yaml", f"generate --model m {ASK}", f"generate --model runs/a {ASK}", "convert m out --quantize 4"],
    "runs/a": [
        f"generate --model runs/a {ASK}",
        "train --resume runs/a",
        "fuse runs/a out --force",
        "runs show runs/a",
        "runs report runs/a --out a.html",
        "runs --all",
        "eval runs/a rows.jsonl",
        "export runs/a out --format peft",
        "export runs/a out.gguf --format gguf",
        "push runs/a ada/a --dry-run",
    ],
    "runs/r": [
        "score runs/r pairs.jsonl",
        "train --resume runs/r",
        "runs show runs/r",
        "export runs/r out --format seq-cls",
    ],
    "peft": ["import peft out", "import peft out --model m"],
    "m.gguf": [f"generate --model m.gguf {ASK}", "convert m.gguf out", "check r.yaml model.path=m.gguf"],
}


def folder_case(place: Path, rng: random.Random) -> list[str]:
    """A model, an adapter, a run or a GGUF file that is damaged."""
    target = place / rng.choice(list(OPENED))
    files = [p for p in target.rglob("*") if p.is_file() and p.suffix in DAMAGED]
    damage_file(rng.choice(sorted(files) or [target]), rng)
    (place / "r.yaml").write_text(yaml.safe_dump(settings("rows.jsonl", "messages")))
    return rng.choice(OPENED[str(target.relative_to(place))]).split()


def likely(kind: Any, key: str) -> list[Any]:
    """Values that a setting may well have: its choices, and what others have."""
    *sections, name = key.split(".")
    for section in sections:
        kind = kind.model_fields[section].annotation
    found, todo = [kind.model_fields[name].default], [kind.model_fields[name].annotation]
    while todo:
        at = todo.pop()
        if get_origin(at) is Literal:
            found += get_args(at)
        else:
            todo += get_args(at)
    found = [v for v in found if isinstance(v, str | int | float | bool)]
    return found if len(found) > 2 else [*found, *LIKELY]


def recipe_case(place: Path, rng: random.Random) -> list[str]:
    """A recipe in which settings are damaged, or overrides."""
    from mlxft.config import all_keys, config_class

    objective = rng.choice(list(FORMS))
    form = FORMS[objective]
    found = settings("rows.jsonl" if form == "messages" else "pairs.jsonl", form, objective)
    if form == "prompts":
        found |= {"rollout": {"prompts": 2, "max_tokens": 3}, "rewards": {"rules": [{"kind": "length", "max": 2}]}}
        found["rollout"] |= {"samples": 2} if objective in ("grpo", "rloo", "online_dpo") else {}
        found.pop("batch")
    found["run"]["name"] = "new"
    kind = config_class(objective)
    keys = all_keys(kind)
    args = ["check", "r.yaml"]
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(keys)
        value = rng.choice(likely(kind, key) if rng.random() < 0.7 else NASTY)
        if rng.random() < 0.5:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            args.append(f"{key}={text}".replace("\0", "\\0"))
        else:
            section, _, leaf = key.partition(".")
            if leaf and isinstance(found.setdefault(section, {}), dict):
                found[section][leaf] = value
            else:
                found[key] = value
    try:
        text = (
            json.dumps(found).encode() if rng.random() < 0.5 else yaml.safe_dump(found).encode("utf-8", "surrogatepass")
        )
    except (ValueError, RecursionError):  # Python itself does not write out the longest numbers
        text = rng.choice(TEXTS)
    (place / "r.yaml").write_bytes(text if rng.random() < 0.9 else damaged_bytes(text, rng))
    return args


def row_case(place: Path, rng: random.Random) -> list[str]:
    """A file of rows in which some are damaged."""
    form = rng.choice(list(ROWS))
    sys.set_int_max_str_digits(0)
    lines = [json.dumps(ROWS[form])] * 3 + [json.dumps(damaged(ROWS[form], rng))]
    text = "\n".join(lines).encode()
    (place / "x.jsonl").write_bytes(text if rng.random() < 0.7 else damaged_bytes(text, rng))
    if rng.random() < 0.05:
        damage_file(place / "x.jsonl", rng)
    (place / "r.yaml").write_text(yaml.safe_dump(settings("x.jsonl", form)))
    return ["check", "r.yaml"]


def watch(place: Path, allowed: tuple[str, ...]) -> None:
    """Write what this process does outside of its folder to `outside.txt`."""
    log = os.open(place / "outside.txt", os.O_WRONLY | os.O_CREAT)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            path = os.path.abspath(os.fsdecode(args[0]))
            if "/outside/" in path or (writes and not path.startswith(allowed)):
                os.write(log, f"opened {path}\n".encode("utf-8", "replace"))
        elif event in ("os.remove", "os.rmdir", "shutil.rmtree", "os.rename"):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not path.startswith(allowed):
                os.write(log, f"{event} {path}\n".encode("utf-8", "replace"))

    sys.addaudithook(hook)


def in_child(work: Callable[[], None], seconds: float, enough: float = math.inf) -> tuple[int, float, int]:
    """Exit code (negative: by that signal; -9 after `seconds`), seconds and bytes of a forked process.

    After `enough` seconds it gets Ctrl-C, once; its time counts from there.
    """
    began = time.monotonic()
    if (pid := os.fork()) == 0:
        os.setsid()
        try:
            work()
        except SystemExit as stop:
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(70)
        os._exit(0)
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > enough:
            os.kill(pid, signal.SIGINT)
            began, enough = time.monotonic(), math.inf
        if time.monotonic() - began > seconds:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began, used.ru_maxrss * 1024


def command(place: Path, args: list[str]) -> Callable[[], None]:
    def work() -> None:
        from mlxft.cli import main

        os.chdir(place)
        os.environ.update(
            MLXFT_CACHE=str(place / "cache"), MPLCONFIGDIR=str(place / "cache"), HF_HUB_OFFLINE="1", COLUMNS="200"
        )
        for number, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        size = (
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            if sys.platform == "linux"
            else 0
        )
        if size:  # beside what is mapped already
            resource.setrlimit(resource.RLIMIT_AS, (size + 2 * BYTES, size + 2 * BYTES))
        watch(place, (str(place), tempfile.gettempdir(), "/dev/"))
        sys.argv = ["mlxft", *args]
        main()

    return work


def prepare(place: Path) -> None:
    """A model, rows and a run to be damaged."""
    from conftest import build_model_dir, write_chat

    def work() -> None:
        build_model_dir(place / "m")

    assert in_child(work, 120)[0] == 0
    write_chat(place / "rows.jsonl", 6)
    pairs = [{"prompt": f"the {w}", "chosen": f"in {w}", "rejected": "on"} for w in ("a", "or", "at", "to")]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (place / "good.yaml").write_text(yaml.safe_dump(settings("rows.jsonl", "messages")))
    (place / "reward.yaml").write_text(yaml.safe_dump(settings("pairs.jsonl", "preference", "reward")))
    for args in (
        "train good.yaml run.save_every=1",
        "train reward.yaml run.save_every=1 run.name=r",
        "export runs/a peft --format peft",
        "export runs/a m.gguf --format gguf",
    ):
        assert in_child(command(place, args.split()), 120)[0] == 0, (place / "err.txt").read_text()


CASES = {"folders": folder_case, "recipes": recipe_case, "rows": row_case}


def fuzz(counts: dict[str, int], seed: int, say: Callable[[str], None] = print) -> list[str]:
    """Run so many cases of each kind. Returns what went wrong, a line each."""
    import mlxft.check
    import mlxft.cli.use
    import mlxft.run  # noqa: F401  once, for all processes

    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        base, outside = Path(root).resolve() / "base", Path(root).resolve() / "outside"
        outside.mkdir()
        (outside / "secret.txt").write_text("secret")
        base.mkdir()
        prepare(base)
        for kind, count in counts.items():
            codes: collections.Counter[int] = collections.Counter()
            trained: collections.Counter[int] = collections.Counter()
            slowest, most, before = 0.0, 0, len(wrong)
            for number in range(count):
                place = base.with_name("case")
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(base, place)
                args = CASES[kind](place, random.Random(f"{seed} {kind} {number}"))
                code, took, used = in_child(command(place, args), SECONDS)
                codes[code], slowest, most = codes[code] + 1, max(slowest, took), max(most, used)
                faults = []
                if kind == "recipes" and code == 0:  # what check accepts train begins
                    args[0] = "train"
                    code, took, used = in_child(command(place, args), SECONDS, ENOUGH)
                    trained[code], slowest, most = trained[code] + 1, max(slowest, took), max(most, used)
                    faults += ["check accepts it"] if code == 2 else []
                    code = 0 if code == 130 else code
                err = (place / "err.txt").read_text("utf-8", "replace")
                left = (place / "outside.txt").read_text() if (place / "outside.txt").exists() else ""
                if kind == "recipes":  # the user's own, which may name any file to be read
                    left = "".join(line for line in left.splitlines(True) if "/outside/" not in line)
                faults += [f"exit code {code}"] if code not in (0, 1, 2) else []
                faults += ["a traceback"] if "Traceback" in err else []
                faults += [f"{used / 1e9:.1f} GB"] if used > BYTES else []
                faults += [f"outside: {left.splitlines()[0]}"] if left else []
                if (outside / "secret.txt").read_text() != "secret" or len(list(outside.iterdir())) != 1:
                    faults.append("outside was changed")
                if faults:
                    last = err.strip().splitlines()[-1:] or [""]
                    wrong.append(f"{kind} {number}: {', '.join(faults)}: mlxft {' '.join(args)[:200]}: {last[0][:200]}")
            also = f", trained {dict(sorted(trained.items()))}" if trained else ""
            say(
                f"{kind}: {count} cases, exit codes {dict(sorted(codes.items()))}{also}, slowest {slowest:.1f} s, most "
                f"memory {most / 1e9:.2f} GB, {len(wrong) - before} wrong"
            )
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("folders", 100), ("recipes", 1000), ("rows", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    found = fuzz({kind: getattr(given, kind) for kind in CASES}, given.seed)
    print("\n".join(found).encode("ascii", "backslashreplace").decode())
    sys.exit(bool(found))
