"""Files as people have them: published layouts, tables, exports. Each is trained as meant without a setting, or gives
one error with the settings to write, which then work."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from spreadsheets import ods, xlsx

from mlxft.config import override_all, parse_config
from mlxft.data.dataset import load_splits, with_format
from mlxft.data.formats import Completion, Conversation, Item, Pair, Ranked, Text
from mlxft.errors import MlxftError

Q, A = ["Where is Ulm?", "What is 6 x 7?", "Who wrote Faust?"], ["On the Danube.", "42", "Goethe wrote it."]
BAD = ["In Spain.", "41", "Nobody."]


def turns(i: int, role: str = "role", content: str = "content", user: str = "user", bot: str = "assistant") -> Any:
    return [{role: user, content: Q[i]}, {role: bot, content: A[i]}]


def jsonl(path: Path, make: Callable[[int], Any]) -> None:
    path.write_text("".join(json.dumps(make(i), ensure_ascii=False) + "\n" for i in range(3)), "utf-8")


def table(path: Path, head: list[str], sign: str = ",", encoding: str = "utf-8", after: str = "") -> None:
    lines = [head, *([q, a, *["x"] * (len(head) - 2)] for q, a in zip(Q, A))]
    path.write_bytes(("\r\n".join(sign.join(line) for line in lines) + "\r\n" + after).encode(encoding))


def chatgpt(i: int) -> dict[str, Any]:
    """A conversation as ChatGPT exports it: a tree, with a branch that was not kept, a tool, and hidden messages."""

    def node(name: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
        content = {"content_type": "text", "parts": [text]}
        message = {"author": {"role": role}, "content": content, "recipient": "all", "metadata": {}, **more}
        return {"id": name, "parent": parent, "children": [], "message": message if role else None}

    return {
        "title": "t",
        "current_node": "e",
        "mapping": {
            "r": node("r", None, "", ""),
            "s": node("s", "r", "system", "", metadata={"is_visually_hidden_from_conversation": True}),
            "a": node("a", "s", "user", Q[i]),
            "x": node("x", "a", "assistant", "Another branch."),
            "c": node("c", "a", "assistant", "search()", recipient="browser"),
            "d": node("d", "c", "tool", "results"),
            "e": node("e", "d", "assistant", A[i]),
        },
    }


def claude(i: int) -> dict[str, Any]:
    said = [("human", Q[i]), ("assistant", A[i])]
    chat = [
        {"sender": who, "text": text, "content": [{"type": "text", "text": text}], "files": []} for who, text in said
    ]
    return {"uuid": f"{i}", "name": "t", "chat_messages": chat}


def oasst(path: Path) -> None:
    text = [{"text": f"### Human: {q}### Assistant: {a}"} for q, a in zip(Q, A)]
    path.write_text("".join(json.dumps(row) + "\n" for row in text))


ALPACA = {"instruction": Q[0], "input": "", "output": A[0]}
HH = [f"\n\nHuman: {q}\n\nAssistant: " for q in Q]
QA = "user: {q} | assistant: {a}"
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    # published layouts
    "alpaca.json": (
        lambda p: p.write_text(json.dumps([{**ALPACA, "instruction": q, "output": a} for q, a in zip(Q, A)], indent=1)),
        QA,
    ),
    "alpaca-with-text.jsonl": (lambda p: jsonl(p, lambda i: {**ALPACA, "text": f"{Q[0]} ### {A[0]}"}), QA),
    "dolly.jsonl": (
        lambda p: jsonl(p, lambda i: {"instruction": Q[i], "context": "", "response": A[i], "category": "qa"}),
        QA,
    ),
    "guanaco.jsonl": (oasst, "text: ### Human: {q}### Assistant: {a}"),
    "openhermes.json": (
        lambda p: p.write_text(
            json.dumps([{"source": "x", "conversations": turns(i, "from", "value", "human", "gpt")} for i in range(3)])
        ),
        QA,
    ),
    "ultrachat_200k.jsonl": (
        lambda p: jsonl(p, lambda i: {"prompt": Q[i], "prompt_id": "f", "messages": turns(i)}),
        QA,
    ),
    "ultrachat.jsonl": (lambda p: jsonl(p, lambda i: {"id": f"{i}", "data": [Q[i], A[i]]}), QA),
    "gsm8k.jsonl": (lambda p: jsonl(p, lambda i: {"question": Q[i], "answer": A[i]}), "prompt: {q} | completion: {a}"),
    "openorca.jsonl": (
        lambda p: jsonl(
            p, lambda i: {"id": f"n.{i}", "system_prompt": "Be brief.", "question": Q[i], "response": A[i]}
        ),
        "system: Be brief. | user: {q} | assistant: {a}",
    ),
    "metamath.json": (
        lambda p: p.write_text(
            json.dumps([{"type": "x", "query": Q[i], "original_question": "?", "response": A[i]} for i in range(3)])
        ),
        "prompt: {q} | completion: {a}",
    ),
    "squad.jsonl": (
        lambda p: jsonl(
            p,
            lambda i: {
                "id": f"{i}",
                "title": "T",
                "context": "A text.",
                "question": Q[i],
                "answers": {"text": [A[i], "x"], "answer_start": [3, 4]},
            },
        ),
        "prompt: A text.\n\n{q} | completion: {a}",
    ),
    "numina.jsonl": (
        lambda p: jsonl(p, lambda i: {"problem": Q[i], "solution": A[i], "messages": turns(i), "source": "x"}),
        QA,
    ),
    "mental-health.csv": (lambda p: table(p, ["Context", "Response"]), "prompt: {q} | completion: {a}"),
    "speakers.jsonl": (
        lambda p: jsonl(p, lambda i: {"dialogue": turns(i, "speaker", "text", "Customer", "Agent")}),
        QA,
    ),
    "chat-under-another-name.jsonl": (lambda p: jsonl(p, lambda i: {"chat": turns(i), "lang": "en"}), QA),
    "messages-from-value.jsonl": (
        lambda p: jsonl(p, lambda i: {"messages": turns(i, "from", "value", "human", "gpt")}),
        QA,
    ),
    "bedrock.jsonl": (
        lambda p: jsonl(
            p,
            lambda i: {
                "system": [{"text": "Be brief."}],
                "messages": [{**turn, "content": [{"text": turn["content"]}]} for turn in turns(i)],
            },
        ),
        f"system: Be brief. | {QA}",
    ),
    "openai-evals.jsonl": (lambda p: jsonl(p, lambda i: {"input": turns(i)[:1], "ideal": A[i]}), QA),
    "asked-and-said.jsonl": (lambda p: jsonl(p, lambda i: {"input": turns(i)[:1], "output": turns(i)[1:]}), QA),
    # json by other shapes
    "wrapped.json": (
        lambda p: p.write_text(
            json.dumps({"version": 1, "data": [{"input": q, "output": a} for q, a in zip(Q, A)]}, indent=2)
        ),
        "prompt: {q} | completion: {a}",
    ),
    "pandas.json": (
        lambda p: p.write_text(
            json.dumps({"Question": dict(enumerate(Q)), "Answer": dict(enumerate(A)), "n": dict(enumerate([1, 2, 3]))})
        ),
        "prompt: {q} | completion: {a}",
    ),
    "a-mapping.json": (lambda p: p.write_text(json.dumps(dict(zip(Q, A)))), "prompt: {q} | completion: {a}"),
    "array-in.jsonl": (
        lambda p: p.write_text(json.dumps([{"q": q, "a": a} for q, a in zip(Q, A)], indent=1)),
        "prompt: {q} | completion: {a}",
    ),
    # tables
    "excel-german.csv": (
        lambda p: table(p, ["Frage", "Antwort (kurz)"], ";", "cp1252", ";\r\n;\r\n"),
        "prompt: {q} | completion: {a}",
    ),
    "excel-unicode.txt.tsv": (
        lambda p: table(p, ["Question", "Answer"], "\t", "utf-16"),
        "prompt: {q} | completion: {a}",
    ),
    "bom.csv": (lambda p: table(p, ["prompt", "completion"], ",", "utf-8-sig"), "prompt: {q} | completion: {a}"),
    "pandas-index.csv": (
        lambda p: p.write_text(
            ",question,answer\n" + "".join(f"{i},{q},{a}\n" for i, (q, a) in enumerate(zip(Q, A))), "utf-8"
        ),
        "prompt: {q} | completion: {a}",
    ),
    "messages-in.csv": (
        lambda p: p.write_text(
            "id,messages\n" + "".join('{},"{}"\n'.format(i, json.dumps(turns(i)).replace('"', '""')) for i in range(3))
        ),
        QA,
    ),
    "faq.xlsx": (
        lambda p: xlsx(
            p,
            {
                "FAQ": [
                    ["Our questions, 2026", None, None],
                    ["Question", "Answer", "Changed"],
                    [Q[0], A[0], (46000,)],
                    [Q[1], 42, None],
                    [None, None, None],
                    [Q[2], ("=CONCAT(A1)", A[2]), (46001,)],
                    [" ", None, None],
                ],
                "Notes": [[None]],
            },
            merged="A1:C1",
        ),
        "prompt: {q} | completion: {a}",
    ),
    "title-of-two-cells.xlsx": (
        lambda p: xlsx(p, {"S": [["Our FAQ", "2026"], ["Question", "Answer"], *map(list, zip(Q, A))]}),
        "prompt: {q} | completion: {a}",
    ),
    "faq.ods": (
        lambda p: ods(p, [["Pregunta", "Respuesta"], *map(list, zip(Q, A))]),
        "prompt: {q} | completion: {a}",
    ),
    # exports
    "conversations.json": (lambda p: p.write_text(json.dumps([chatgpt(i) for i in range(3)])), QA),
    "claude.json": (lambda p: p.write_text(json.dumps([claude(i) for i in range(3)])), QA),
    "turns.csv": (
        lambda p: p.write_text(
            "conversation_id,time,role,message\n"
            + "".join(
                f"{i},1,end-user,{q}\n{i},2,agent,{a}\n{i},3,end-user,Thanks\n" for i, (q, a) in enumerate(zip(Q, A))
            )
        ),
        QA,
    ),
    "tickets.json": (
        lambda p: p.write_text(
            json.dumps(
                {"tickets": [{"id": i, "comments": turns(i, "author", "body", "customer", "agent")} for i in range(3)]}
            )
        ),
        QA,
    ),
    "logs.jsonl": (
        lambda p: jsonl(
            p,
            lambda i: {
                "request": {"model": "m", "messages": turns(i)[:1]},
                "response": {"choices": [{"index": 0, "message": turns(i)[1]}]},
            },
        ),
        QA,
    ),
    "vertex.jsonl": (
        lambda p: jsonl(
            p,
            lambda i: {
                "systemInstruction": {"parts": [{"text": "Be brief."}]},
                "contents": [{"role": r, "parts": [{"text": t}]} for r, t in (("user", Q[i]), ("model", A[i]))],
            },
        ),
        "system: Be brief. | user: {q} | assistant: {a}",
    ),
    "anki.txt": (
        lambda p: p.write_text("#separator:tab\n#html:false\n" + "".join(map("{}\t{}\n".format, Q, A))),
        "prompt: {q} | completion: {a}",
    ),
    "semicolons.txt": (lambda p: table(p, ["Frage", "Antwort"], ";"), "prompt: {q} | completion: {a}"),
    "excel-tabs.txt": (
        lambda p: table(p, ["Question", "Answer"], "\t", "utf-16"),
        "prompt: {q} | completion: {a}",
    ),
    # texts
    "book.md": (lambda p: p.write_text(f"# Title\n\n{Q[0]}\n"), "text: # Title\n\n{q}"),
    "faq.md": (
        lambda p: p.write_text(
            f"# FAQ\n{'-' * 9999}\n" + "\n## More\n\n".join(map("**Q: {}**\n\nA: {}\n".format, Q, A))
        ),
        "prompt: {q} | completion: {a}",
    ),
    "faq-windows.txt": (
        lambda p: p.write_bytes("".join(map("Frage: {}\r\nAntwort: {}\r\n\r\n".format, Q, A)).encode("utf-16")),
        "prompt: {q} | completion: {a}",
    ),
    # what needs a word of the user: one error with settings, of which the first works
    "two-answers.jsonl": (
        lambda p: jsonl(p, lambda i: {"question": Q[i], "answer": A[i], "response": "other"}),
        "! prompt: {q} | completion: {a}",
    ),
    "own-names.csv": (lambda p: table(p, ["Ticket", "Lösung des Support-Teams"]), "! prompt: {q} | completion: {a}"),
    "pipes.csv": (lambda p: table(p, ["Réponse à", "Réponse"], "|"), "! prompt: {q} | completion: {a}"),
    "prodigy.jsonl": (
        lambda p: jsonl(p, lambda i: {"text": Q[i], "_input_hash": i, "answer": ("accept", "reject", "ignore")[i]}),
        "! text: {q}",
    ),
    "mmlu.jsonl": (
        lambda p: jsonl(p, lambda i: {"question": Q[i], "choices": ["x", "y"], "answer": i % 2}),
        '! prompt: {q}\n["x", "y"] | completion: 0',
    ),
    "a-group.jsonl": (lambda p: jsonl(p, lambda i: {"sender": ("Ann", "Ben")[i % 2], "text": Q[i]}), "! text: {q}"),
    "reviews.csv": (
        lambda p: p.write_text("text,label\n" + "".join(f"{q},{i % 2}\n" for i, q in enumerate(Q))),
        "! prompt: {q} | completion: 0",
    ),
}
PAIRED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "hh.jsonl": (
        lambda p: jsonl(p, lambda i: {"chosen": HH[i] + A[i], "rejected": HH[i] + BAD[i]}),
        "user: {q} | chosen: {a} | rejected: {b}",
    ),
    "ultrafeedback.jsonl": (
        lambda p: jsonl(
            p,
            lambda i: {
                "instruction": Q[i],
                "completions": [{"response": A[i], "overall_score": 9}, {"response": BAD[i], "overall_score": 2}],
            },
        ),
        "prompt: {q} | chosen: {a} | rejected: {b}",
    ),
    "better-worse.csv": (
        lambda p: p.write_text("Question,Better answer,Worse answer\n" + "".join(map("{},{},{}\n".format, Q, A, BAD))),
        "prompt: {q} | chosen: {a} | rejected: {b}",
    ),
}


def spoken(item: Item) -> str:
    """Return an item as a line: what is asked, and what is trained."""
    if isinstance(item, Conversation):
        return " | ".join(f"{turn['role']}: {turn['content']}" for turn in item.messages)
    if isinstance(item, Completion):
        return f"prompt: {item.prompt} | completion: {item.completion}"
    if isinstance(item, Text):
        return f"text: {item.text}"
    if isinstance(item, Ranked):
        return spoken(item.pairs[0])
    assert isinstance(item, Pair)
    sides = [side if isinstance(side, str) else side["content"] for side in (item.chosen, item.rejected)]
    asked = f"prompt: {item.prompt}" if isinstance(item.prompt, str) else f"user: {item.prompt[-1]['content']}"
    return f"{asked} | chosen: {sides[0]} | rejected: {sides[1]}"


def read(path: Path, objective: str = "sft", *overrides: str) -> tuple[list[Item], list[str]]:
    raw: dict[str, Any] = {"objective": objective, "model": {"path": "x"}, "data": {"train": str(path)}}
    assert not override_all(raw, overrides)
    splits = load_splits(with_format(parse_config(raw)).data, 0)
    return [example.item for example in splits.train], splits.notes


@pytest.mark.parametrize("name", [*FILES, *PAIRED])
def test_a_file_is_read_as_meant(name: str, tmp_path: Path) -> None:
    make, wanted = (FILES | PAIRED)[name]
    objective = "preference" if name in PAIRED else "sft"
    make(path := tmp_path / name)
    if name.endswith((".xlsx", ".ods")):
        pytest.importorskip("python_calamine")
    overrides: list[str] = []
    if wanted.startswith("! "):
        with pytest.raises(MlxftError) as caught:
            read(path, objective)
        (first, *_) = [line for line in str(caught.value).splitlines() if line.startswith("  data.format=")]
        assert str(caught.value).count(f"{name}: ") == 1, "one error for the file"
        overrides = shlex.split(first)
    items, notes = read(path, objective, *overrides)
    assert spoken(items[0]) == wanted.removeprefix("! ").format(q=Q[0], a=A[0], b=BAD[0])
    assert len(items) == (1 if name == "book.md" else 3)
    assert overrides or any("rows are read as data.format: " in note for note in notes)
