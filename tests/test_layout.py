"""What keeps the house as it is: who may import whom, the size of functions, and a quick `mlxft --help`."""

from __future__ import annotations

import ast
import io
import re
import resource
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mlxft"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import from rooms of a lower number and from itself.
ORDER = {
    "errors": 0,
    "foreign": 1,
    "text": 1,
    "files": 2,
    "device": 2,
    "distributed": 4,
    "config": 3,
    "lifeline": 3,
    "launch": 4,
    "data": 4,
    "model": 5,
    "objectives": 6,
    "trainer": 7,
    "runs": 8,
    "build": 9,
    "doctor": 9,
    "run": 10,
    "check": 11,
    "exports": 12,
    "study": 12,
    "studio": 13,
    "selftest": 13,
    "demo": 13,
    "api": 13,
    "cli": 14,
    "__main__": 15,
}
# Files and lines of each room, comments and blank lines included. A change that needs more says so here, and why.
# Before the rooms were merged: 189 files, 35,959 lines.
BUDGET = {
    # Sizes by the rows, notes on what can hardly learn, extended runs; pairs in mlxft eval, evaluations side by side.
    # api.py: what a training loop of one's own is made of (examples/); data.stream, data.mix; lifeline.py, launch.py:
    # how ranks on several Macs are started, and learn of each other's end.
    # config.py: data.format: auto, several files of rows; runs.py: where a model's name leads; foreign.py: other tools.
    # runs.py: the runs there are, for a name that is none; foreign.py: 150 more words. build.py: what rounding takes.
    # files.py: why a disk or a quota ends writing, where a library only says how much it wrote; text.py: tables.
    # config.py: a format and fields for each source of rows.
    "top": (18, 9650),
    # streaming and mixtures: rows on the disk, plans as arrays, an epoch of several sources. formats.py: which format
    # and which columns rows have, by what people call them; sources.py: tables, spreadsheets, texts, exported chats.
    # sources.py: formulas without values, other encodings, titles of several cells, kinds of files by their content.
    # dataset.py: each source is recognised by itself; sources.py: sheets and lists that are named for splits;
    # the alphabets that show which encoding a short text has; turns of conversations a row each, logs of an API, decks.
    # questions and answers in a text; rows that can be read and are hardly meant so; other kinds of files.
    "data": (5, 6097),  # judged conversations; dataset.py: samples of rows, which fuse had
    # logits.py: divergences; sampling.py: conversations with kept caches; layers.py: noise on embeddings; frozen.py.
    # shard.py, a base cut over ranks, and arrays that ranks exchange. gguf.py: a table of 20 families, with their
    # settings and layouts, files in parts; tensors read by rows, packed as they are. layers.py: rounding in training.
    # layers.py: stand-ins for layers, which fuse had; the strong directions of inputs, by which rounding is corrected.
    "model": (16, 9130),
    # distill.py; online_dpo.py; episodes.py and environments.py, what they may raise or reply; grpo.py: GSPO, CISPO,
    # exact KL, variants.
    "objectives": (15, 7780),
    "trainer": (5, 1860),  # ranks add up steps and validations, share an optimiser, report and align; notebooks
    # sample and eval play episodes, and share their work over ranks; catalogue.py: open models and what they take;
    # compare.py: several models over one base; serve.py: OpenAI's API over them; start.py: mlxft init.
    # compare.py: what is in memory for the studio's playground, too.
    # start.py: how LLaMA-Factory and Axolotl name columns, whole, of each source; ratings and test rows are said.
    "study": (17, 7460),
    # llama_cpp.py: its quantiser, importance matrices and the comparison with it; gguf.py: families; fuse.py: recipes.
    # gguf.py: several types at once, their figures for --json, what an adapter beside its base saves.
    "exports": (7, 4170),
    "studio": (3, 1310),  # a web server on the loopback device: its gate, pages, runs as processes, charts as SVG
    "demo": (4, 350),  # recipes.py: the recipes of configs/ as they are installed
    # export: --type of llama.cpp, --imatrix, --measure; the shell completes runs and settings.
    "cli": (7, 2567),  # distill-cache, --environment, launch; eval and sample by ranks; serve, compare, models, recipes
}
MOST_FILES = 97  # doors: foreign.py, study/start.py, cli/start.py, what serves, compares and lists models; studio
# Modules that one other module imports. The list may only shrink: such a module belongs into its importer unless it is
# a subject of its own.
SINGLE = {
    *("api", "demo.recipes", "demo.rlhf", "demo.walk", "exports.hub", "exports.ollama", "launch", "model.gemma3n"),
    "exports.llama_cpp",  # the one door to llama.cpp
    *("objectives.distill", "objectives.preference", "objectives.reward", "objectives.sft", "selftest", "studio.app"),
    "study.fewshot",
    *("study.lm_eval", "study.lr_find"),
    *("study.serve", "study.start", "study.sweep", "trainer.checkpoint"),
}
MAX_FUNCTION_LINES = 60
HELP_SECONDS = 0.3
HEAVY = ("datasets", "mlx", "mlx_lm", "numpy", "pyarrow", "pydantic", "tokenizers", "transformers")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs, functions' bodies included: all but the body of `if TYPE_CHECKING:`."""
    yield node
    for child in node.orelse if is_type_checking(node) else ast.iter_child_nodes(node):  # type: ignore[attr-defined]
        yield from running_nodes(child)


def imported_modules(tree: ast.Module, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module of `package`; `from a import b` counts as a.b."""
    for node in running_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, node.module] if node.module else base
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)


def wrong_imports(source: str, path: str) -> list[str]:
    """The imports of the module at `path` (such as 'mlxft/data/dataset.py') that go against the order."""
    *package, _ = path.split("/")
    room = package[1] if len(package) > 1 else path.rsplit("/", 1)[1].removesuffix(".py")
    if room not in ORDER:
        return [f"{path}: {room} is not in the order of rooms ({', '.join(ORDER)})"]
    offenders = []
    for line, name in imported_modules(ast.parse(source), package):
        head, _, rest = name.partition(".")
        target = rest.split(".")[0]
        # What is not a room is a name of mlxft/__init__.py, as in `from mlxft import __version__`.
        if head != "mlxft" or target not in ORDER or target == room or ORDER[target] < ORDER[room]:
            continue
        offenders.append(f"{path}:{line}: {room} imports {name}")
    return offenders


def function_lines(node: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert node.end_lineno is not None
    first = node.body[0]
    has_docstring = ast.get_docstring(node, clean=False) is not None
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if has_docstring else 0
    return node.end_lineno - node.lineno + 1 - docstring


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("mlxft/data/dataset.py", "from mlxft.model.load import load", True),
        ("mlxft/data/dataset.py", "from mlxft.errors import DataError\nfrom mlxft.data import sources", False),
        ("mlxft/data/dataset.py", "def f():\n    import mlxft.model.load", True),
        ("mlxft/data/dataset.py", "from ..model import load", True),
        ("mlxft/data/dataset.py", "from . import sources\nfrom .formats import FORMATS", False),
        ("mlxft/data/dataset.py", "from mlxft import model", True),
        ("mlxft/data/dataset.py", "if TYPE_CHECKING:\n    from mlxft.model.load import Loaded", False),
        ("mlxft/data/dataset.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import mlxft.run", True),
        ("mlxft/exports/fuse.py", "from mlxft.study import runs", True),
        ("mlxft/study/sweep.py", "from mlxft.exports import fuse", True),
        ("mlxft/run.py", "from mlxft.demo import walk", True),
        ("mlxft/demo/walk.py", "from mlxft.run import run\nfrom mlxft import __version__", False),
        ("mlxft/config.py", "def f():\n    import mlxft.objectives", True),
        ("mlxft/config.py", "from mlxft.config import Config\nfrom mlxft.config import explain", False),
        ("mlxft/data/dataset.py", "from mlxft.config import load_config", False),
        ("mlxft/config.py", "from mlxft.data import sources", True),
        ("mlxft/attic/old.py", "import json", True),
    ],
)
def test_the_import_check_sees(path: str, source: str, wrong: bool) -> None:
    """The checker itself, on sources whose answer is known."""
    assert bool(wrong_imports(source, path)) is wrong


def test_imports_go_one_way() -> None:
    """config -> data -> model -> objectives -> train -> run -> study, export -> cli; mlxft/__init__.py is exempt."""
    assert len(FILES) > 5, f"no package found at {PACKAGE}"
    modules = [f for f in FILES if f != PACKAGE / "__init__.py"]
    offenders = [line for f in modules for line in wrong_imports(f.read_text(), relative(f))]
    assert not offenders, "imports against the order of rooms:\n" + "\n".join(offenders)


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not, inside functions included (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in imports.get(name, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            at = stack.index(name)
            found.append(stack[at:])
            del stack[at:]

    for name in imports:
        if name not in index:
            visit(name)
    return [sorted(group) for group in found if len(group) > 1]


def test_no_modules_import_each_other() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}})
    names = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    names.pop("mlxft")  # the Python API, which names everything
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        package = list(path.relative_to(PACKAGE.parent).parts[:-1])
        seen = {target for _, target in imported_modules(parsed(path), package)}
        found[name] = {n if n in names else n.rpartition(".")[0] for n in seen} & names.keys() - {name}
    assert not circles(found), f"import circles: {circles(found)}"


def test_rooms_keep_their_budgets() -> None:
    files: dict[str, list[Path]] = {}
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        files.setdefault(parts[0] if len(parts) > 1 else "top", []).append(path)
    assert files.keys() == BUDGET.keys()
    over = []
    for room, (count, lines) in BUDGET.items():
        found = len(files[room]), sum(len(path.read_text().splitlines()) for path in files[room])
        if found[0] > count or found[1] > lines:
            over.append(f"{room}: {found[0]} files, {found[1]} lines; the budget is {count} and {lines}")
    assert not over, "\n".join(over)
    assert len(FILES) <= MOST_FILES


def importers() -> dict[str, set[str]]:
    """Module -> the modules of the package that import it, inside functions included."""
    names = {".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        package = list(path.relative_to(PACKAGE.parent).parts[:-1])
        for _, target in imported_modules(parsed(path), package):
            short = target.removeprefix("mlxft.")
            there = short if short in names else short.rpartition(".")[0]
            if there in names and there != name:
                found[there].add(name)
    return found


def test_few_modules_have_one_importer() -> None:
    single = {name for name, users in importers().items() if len(users) == 1}
    assert not single - SINGLE, f"one importer each: {sorted(single - SINGLE)}; merge them, or say why not"
    assert not SINGLE - single, f"no longer so: take {sorted(SINGLE - single)} off the list"


def test_nobody_asks_what_kind_of_objective_it_is() -> None:
    """What planning, checking and searching ask of an objective is a method of the contract, with a default."""
    kinds = {"Objective", "OffPolicy", "OnPolicy", "SFT", "Reward", "PPO", "GRPO", "RLOO", "Reinforce", "OnlineDPO"}
    offenders = []
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] == "objectives":
            continue
        for node in ast.walk(parsed(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            asked = " ".join(ast.unparse(arg) for arg in node.args)
            by_kind = node.func.id in ("isinstance", "issubclass") and kinds & set(asked.replace(",", " ").split())
            by_name = node.func.id == "hasattr" and "objective" in ast.unparse(node.args[0])
            if by_kind or by_name:
                offenders.append(f"{relative(path)}:{node.lineno}: {ast.unparse(node)}")
    assert not offenders, "\n".join(offenders)


def public_names(path: Path) -> set[str]:
    """What a module defines for others: its functions, classes and constants, without those that start with _."""
    found = set()
    for node in parsed(path).body:
        if isinstance(node, Function | ast.ClassDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_public_names_are_unique() -> None:
    """One word, one type. cli/ has commands by the names that users type; mlxft/__init__.py names what others have."""
    places: dict[str, list[str]] = {}
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] not in ("cli", "__init__.py"):
            for name in public_names(path):
                places.setdefault(name, []).append(relative(path))
    twice = [f"{name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]
    assert not twice, "public names that stand in several modules:\n" + "\n".join(twice)


def test_data_needs_no_mlx() -> None:
    offenders = []
    for path in (PACKAGE / "data").rglob("*.py"):
        for line, name in imported_modules(parsed(path), ["mlxft", "data"]):
            if name.split(".")[0] in ("mlx", "mlx_lm"):
                offenders.append(f"{relative(path)}:{line}: {name}")
    assert not offenders, "mlxft/data works without mlx, but imports it:\n" + "\n".join(offenders)


def test_functions_are_short() -> None:
    offenders = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, Function) and (n := function_lines(node)) > MAX_FUNCTION_LINES:
                offenders.append(f"{relative(path)}:{node.lineno}: {node.name}, {n} lines")
    assert not offenders, f"functions over {MAX_FUNCTION_LINES} lines, docstring not counted:\n" + "\n".join(offenders)


def test_function_lines_leave_out_the_docstring() -> None:
    tree = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n')
    assert isinstance(tree.body[0], ast.FunctionDef)
    assert function_lines(tree.body[0]) == 3


def test_no_pickle_and_no_default_device() -> None:
    """Weights are safetensors only; the device is the user's choice (and setting it globally outlives a test)."""
    offenders = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            names += [node.id] if isinstance(node, ast.Name) else []
            bad = {n for n in names if n.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "set_default_device")}
            bad |= {"allow_pickle"} if isinstance(node, ast.keyword) and node.arg == "allow_pickle" else set()
            offenders += [f"{relative(path)}:{getattr(node, 'lineno', 0)}: {name}" for name in sorted(bad)]
    assert not offenders, "neither pickle nor a default device:\n" + "\n".join(offenders)


def test_text_is_printed_at_one_door() -> None:
    """mlxft/text.py takes control characters and markup out of what rows, models and names bring along."""
    offenders = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if (
                called in ("json.load", "json.loads", "Console", "print", "click.echo", "click.secho", "rich.print")
                and path.name != "text.py"
            ):
                offenders.append(f"{relative(path)}:{node.lineno}: {called}")
    assert not offenders, "print by mlxft.text's echo or make_console, parse by its parse_json:\n" + "\n".join(
        offenders
    )


def child_seconds() -> float:
    """CPU time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick() -> None:
    script = Path(sys.executable).parent / "mlxft"
    assert script.exists(), f"the console script is not installed beside {sys.executable}: pip install -e ."
    best = float("inf")
    for _ in range(5):  # the best of five, and CPU time: other work on the machine must not count
        start = child_seconds()
        done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
        best = min(best, child_seconds() - start)
        assert done.returncode == 0, f"mlxft --help failed:\n{done.stderr}"
        assert "train" in done.stdout
    assert best < HELP_SECONDS, f"mlxft --help took {best:.2f} s at best; wanted: under {HELP_SECONDS} s"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mlxft.cli import main\nsys.argv = ['mlxft', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"mlxft --help failed:\n{done.stderr}"
    loaded = set(done.stdout.rpartition("LOADED ")[2].split())
    assert "click" in loaded, f"mlxft --help did not get far:\n{done.stdout}"
    offenders = [name for name in HEAVY if name in loaded]
    assert not offenders, f"mlxft --help imports {', '.join(offenders)}: move the import into the command that needs it"


# --- plain English ----------------------------------------------------------------------------------------------------
# One word for one thing, and standard English, in all texts of the package.

# Regular expressions for whole words.
FORBIDDEN = [
    # Not standard English, or a riddle.
    *(
        r"can not",
        r"(?<!there )is no such",
        r"is no run",
        r"of which",
        r"wished",
        r"told",
        r"by itself",
        r"chosen by lot",
    ),
    *(r"asked for is", r"is none of", r"\w+error: so it is", r"it is none", r"anew", r"go on", r"goes on", r"gone on"),
    *(r"it is no", r"(?<!there )is no (?:recipe|adapter|model|folder|file|number|text|mapping)", r"in words"),
    *(r"who gives", r"who can"),
    # Another word for a completion, a pair, a step, an adapter or a model.
    *(r"answer(?:s|ed)?", r"continuations?", r"judged", r"shipments?", r"micro-?batch(?:es)? a step"),
    # A name of our own for a standard thing.
    *(r"advise", r"strayed", r"twin", r"hears?", r"tells", r"worth", r"mends"),
]
# Names of fields and files, and the texts of `mlxft label`, which is about judgements.
# An answer is what follows a model's thoughts.
ALLOWED = re.compile(
    r'"answers?"|answers\.jsonl|prompt and answers|(?:is|are|be|prompts) judged|'
    r"answer(?:,)? without (?:its|the) thoughts|leaves no answer|no run or folder"
)


# A reasoning model's completion has thoughts and an answer; rows of ratings and tasks have such a field.
EXEMPT = {
    "mlxft/data/chat.py": "answer",
    "mlxft/data/formats.py": "answers?",
    "mlxft/data/sources.py": "answers?",
    "mlxft/study/tasks.py": "answers?",
    "mlxft/objectives/episodes.py": "answer",
    "mlxft/objectives/environments.py": "answer",
} | dict.fromkeys(("mlxft/study/evaluate.py", "mlxft/study/generate.py", "mlxft/study/score.py"), r"answers?|is no run")


def texts_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each string with more than one word, docstring and comment in a module."""
    tree = ast.parse(source)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            pieces = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
            yield node.lineno, " ".join("".join(map(str, pieces)).split())
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, " ".join(node.value.split()) if " " in node.value else ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def forbidden_words(source: str, exempt: str = r"(?!)") -> list[tuple[int, str]]:
    """Return (line, words) of each forbidden word or phrase in a module's texts, but for those that match `exempt`."""
    pattern = re.compile(rf"\b(?:{'|'.join(FORBIDDEN)})\b", re.IGNORECASE)
    texts = ((line, ALLOWED.sub("", text)) for line, text in texts_of(source))
    found = [(line, words[0]) for line, text in texts for words in pattern.finditer(text)]
    return [(line, words) for line, words in found if not re.fullmatch(exempt, words)]


def test_texts_are_plain_english() -> None:
    assert forbidden_words('raise E(f"{x} can not be\\n read")') == [(1, "can not")]
    assert forbidden_words('x = 1  # he was told\ndef f():\n    """Do it.\n\n    The answer.\n    """') == [
        (3, "answer"),
        (1, "told"),
    ]
    assert not forbidden_words('help("Judge completions of \\"answers\\"; cannot")\ntold = "told"')
    offenders = [
        f"{relative(f)}:{line}: {word}"
        for f in FILES
        for line, word in forbidden_words(f.read_text(), EXEMPT.get(relative(f), r"(?!)"))
    ]
    assert not offenders, "words that mlxft's texts do not use:\n" + "\n".join(offenders)
