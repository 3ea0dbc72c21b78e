"""A folder for Ollama: model.gguf and a Modelfile with chat template, stop words, parameters and system prompt.

Ollama's template is written in Go. It is found by rendering conversations with the tokenizer's own Jinja template, and
kept only if it gives the same text for all of them.
Source: Ollama's docs/modelfile.md and docs/template.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mlxft.errors import ExportError
from mlxft.export import gguf
from mlxft.export.gguf_vocab import chat_template
from mlxft.export.go_template import literal, render
from mlxft.model.folder import check_unused, replace_folder
from mlxft.model.load import Loaded
from mlxft.rundir import find_adapter

# What generation_config.json calls a setting -> what a Modelfile does.
_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
_PARAMETERS["repetition_penalty"] = "repeat_penalty"


class Chat(NamedTuple):
    """How a model wants to be spoken to, in Ollama's terms."""

    template: str | None  # None: not one that Go's template can be found for
    system: str | None  # the system prompt that the model's own template begins with


def export_ollama(run: Path, out: Path, *, kind: str, model: str | None = None, overwrite: bool = False) -> list[str]:
    """Write the folder `out` with model.gguf and Modelfile; then: ollama create NAME -f OUT/Modelfile.

    Args:
        as for `export_gguf`; `out` is a folder.
    Returns:
        What was done, a sentence each.
    Raises:
        ExportError, ModelError: as for `export_gguf`.
    """
    gguf.check_arguments(kind)
    _check_folder(out, overwrite)
    loaded = gguf.open_model(run, model)
    check_unused(out, [loaded.path, find_adapter(run)])
    chat = find_chat(loaded.tokenizer)
    text = modelfile(chat, stop_words(loaded.tokenizer), parameters(loaded))
    with replace_folder(out) as part:
        said = gguf.write_model(run, loaded, part / "model.gguf", kind)
        (part / "Modelfile").write_text(text, encoding="utf-8")
    size = (out / "model.gguf").stat().st_size
    said = [f"wrote {out} (model.gguf, {size / 1e6:,.1f} MB, {kind}; Modelfile)", *said[1:]]
    if chat.template is None:
        why = (
            "has no chat template" if chat_template(loaded.tokenizer) is None else "has a chat template of its own kind"
        )
        said.append(f"the model {why}: the Modelfile has no TEMPLATE, and Ollama goes by what it finds in model.gguf")
    return [*said, f"next: ollama create {out.resolve().name} -f {out / 'Modelfile'}"]


def _check_folder(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out}: exists and is a file; give a folder's name")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ExportError(f"{out}: exists already; give another name, or overwrite it (--overwrite)")
    if not (out / "Modelfile").is_file():
        raise ExportError(f"{out}: has no Modelfile, so it is not overwritten; give another name")


def modelfile(chat: Chat, stops: list[str], numbers: dict[str, float]) -> str:
    """The text of a Modelfile."""
    lines = ["FROM ./model.gguf"]
    if chat.template is not None:
        lines.append(f"TEMPLATE {quoted(chat.template)}")
    if chat.system:
        lines.append(f"SYSTEM {quoted(chat.system)}")
    lines += [f"PARAMETER stop {quoted(word)}" for word in stops]
    lines += [f"PARAMETER {name} {value:g}" for name, value in numbers.items()]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A value in a Modelfile: three quotes, between which everything stands for itself.

    Raises:
        ExportError: it holds three quotes, or one at its end, which a Modelfile has no way to write.
    """
    if '"' not in text and "\n" not in text:
        return f'"{text}"'
    if '"""' in text or text.endswith('"'):
        raise ExportError(f"a Modelfile can not hold this text, for its quotes: {text[:80]!r}")
    return f'"""{text}"""'


def stop_words(tokenizer: Any) -> list[str]:
    """Texts of the tokens that end an answer."""
    ids = sorted({*getattr(tokenizer, "eos_token_ids", ()), tokenizer.eos_token_id} - {None})
    return [str(tokenizer.convert_ids_to_tokens(int(i))) for i in ids]


def parameters(loaded: Loaded) -> dict[str, float]:
    """How the base's makers would sample, from generation_config.json."""
    file = loaded.path / "generation_config.json" if loaded.path else None
    if file is None or not file.is_file():
        return {}
    given = json.loads(file.read_text(encoding="utf-8"))
    if given.get("do_sample") is False:
        return {"temperature": 0.0}
    return {theirs: given[ours] for ours, theirs in _PARAMETERS.items() if isinstance(given.get(ours), (int, float))}


# Words that stand in no template.
_SYSTEM, _FIRST, _ANSWER, _SECOND, _REPLY = "sysqx", "firstqx", "answerqx", "secondqx", "replyqx"


def _conversation(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def find_chat(tokenizer: Any) -> Chat:
    """The Go template that gives the text of the tokenizer's Jinja template, and its own system prompt."""
    if chat_template(tokenizer) is None:
        return Chat(None, None)
    plain = _jinja(tokenizer, _conversation(_FIRST, _ANSWER, _SECOND))
    if plain is None or any(plain.count(word) != 1 for word in (_FIRST, _ANSWER, _SECOND)):
        return Chat(None, None)
    start, rest = plain.split(_FIRST)
    asked, rest = rest.split(_ANSWER)
    between, end = rest.split(_SECOND)
    if not asked.startswith(end):  # what follows a question begins with the mark that asks for an answer
        return Chat(None, None)
    with_system = _jinja(tokenizer, _conversation(_FIRST, system=_SYSTEM))
    before = after = None
    if with_system is not None and with_system.count(_SYSTEM) == 1 and with_system.count(_FIRST) == 1:
        before, rest = with_system.split(_SYSTEM)
        if _FIRST in rest:
            after = rest.split(_FIRST)[0]
    answer = asked.removeprefix(end)
    if before is not None and after is not None:
        template = _template(start, end, answer, between, before, after)
        if _agrees(tokenizer, template, True):
            return Chat(template, _own_system(start, before, after))
    # No system prompts, or in a place where Go's template can not put them: they go before the first question.
    template = _template(start, end, answer, between, start, "\n\n")
    return Chat(template if _agrees(tokenizer, template, False) else None, None)


def _template(start: str, end: str, answer: str, between: str, before: str, after: str) -> str:
    """From the pieces around the texts of a conversation.

    Args:
        start, end: before the first question, and after each one.
        answer, between: before an answer, and after it up to the next question.
        before, after: around a system prompt that stands before the first question.
    """
    # A system prompt is the first message, and printed with the first question.
    first = f"{{{{ if eq $i 0 }}}}{_print(start)}{{{{ else if and $.System (eq $i 1) }}}}"
    question = f"{first}{_print(before)}{{{{ $.System }}}}{_print(after)}{{{{ else }}}}{_print(between)}{{{{ end }}}}"
    user = f'{{{{ if eq .Role "user" }}}}{question}{{{{ .Content }}}}{_print(end)}'
    reply = f'{{{{ else if eq .Role "assistant" }}}}{_print(answer)}{{{{ .Content }}}}{{{{ end }}}}'
    return f"{{{{ range $i, $m := .Messages }}}}{user}{reply}{{{{ end }}}}"


def _print(text: str) -> str:
    return literal(text) if text else ""


def _own_system(start: str, before: str, after: str) -> str | None:
    """The system prompt that stands in a conversation without one, if a Modelfile can hold it."""
    if not (start.startswith(before) and start.endswith(after)):
        return None
    own = start[len(before) : max(len(before), len(start) - len(after))]
    return own if own and '"""' not in own and not own.endswith('"') else None


def _agrees(tokenizer: Any, template: str, system: bool) -> bool:
    """Whether Go and Jinja give one text for conversations of several shapes."""
    texts = [("Who?",), ("Who?", "Me.", "Why?"), ("a b", "c", "d", "e\n\nf", "g {{ .System }}")]
    systems = [None, "Be brief."] if system else [None]
    for given in systems:
        for turns in texts:
            messages = _conversation(*turns, system=given)
            fields = [{"Role": m["role"], "Content": m["content"]} for m in messages]
            theirs = render(template, {"Messages": fields, "System": given or ""})
            if theirs != _jinja(tokenizer, messages):
                return False
    return True


def _jinja(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """The prompt for an answer, without the bos that llama.cpp adds by itself; None where the template refuses."""
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template raises what it likes
        return None
    bos = tokenizer.bos_token
    begins = bos is not None and list(tokenizer.encode("a"))[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if begins else text
