"""Write a folder for Ollama: model.gguf and a Modelfile with chat template, stop words, parameters and system prompt.

Ollama's template is written in Go. It is derived from conversations that the tokenizer's own Jinja template renders,
and kept only if it renders the same text for all of them.
Source: Ollama's docs/modelfile.md and docs/template.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxft.errors import ExportError
from mlxft.exports import gguf
from mlxft.exports.gguf import chat_template
from mlxft.model.folder import check_destination, check_unused, generation_settings, replace_folder
from mlxft.model.load import Loaded
from mlxft.runs import find_adapter

# Name of a setting in generation_config.json -> in a Modelfile.
_PARAMETERS = {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
_PARAMETERS["repetition_penalty"] = "repeat_penalty"


class OllamaChat(NamedTuple):
    """A model's chat format in Ollama's terms."""

    template: str | None  # None: no Go template renders the same
    system: str | None  # the system prompt that the model's own template adds


def export_ollama(
    run: Path,
    out: Path,
    *,
    kind: str | Sequence[str] = "f16",
    model: str | None = None,
    overwrite: bool = False,
    tell: Callable[[str], object] = lambda text: None,
    **form: Any,
) -> gguf.Exported:
    """Write the folder `out` with model.gguf and Modelfile, for `ollama create NAME -f OUT/Modelfile`.

    Arguments, results and errors are as for `export_gguf`, but `out` is a folder, and holds one kind.
    """
    wanted = gguf.GgufForm.of(kind, **form)
    if len(wanted.kinds) > 1:
        raise ExportError(
            f"a folder for Ollama holds one .gguf file, not {', '.join(wanted.kinds)}; give one --type (to compare "
            "types: --format gguf --measure with each --type)"
        )
    check_destination(out, overwrite, "ollama")
    loaded = gguf.open_model(run, model)
    check_unused(out, [loaded.path, find_adapter(run)])
    chat = find_chat(loaded.tokenizer)
    text = modelfile(chat, stop_words(loaded.tokenizer), parameters(loaded))
    with replace_folder(out, "ollama") as part:
        done = gguf.write_gguf(run, model, loaded, wanted.files(part / "model.gguf"), wanted, tell)
        (part / "Modelfile").write_text(text, encoding="utf-8")
    (file,) = done.figures["files"]
    file["path"] = str(out / "model.gguf")
    said = [f"wrote {out} (model.gguf, {file['bytes'] / 1e6:,.1f} MB, {file['type']}; Modelfile)", *done[1:]]
    if chat.template is None:
        why = "no chat template" if chat_template(loaded.tokenizer) is None else "a chat template of its own kind"
        said.append(f"the model has {why}: the Modelfile has no TEMPLATE, and Ollama uses what it finds in model.gguf")
    said.append(f"next: ollama create {out.resolve().name} -f {out / 'Modelfile'}")
    return gguf.Exported(said, done.figures)


def modelfile(chat: OllamaChat, stops: list[str], numbers: dict[str, float]) -> str:
    """Return the text of a Modelfile."""
    lines = ["FROM ./model.gguf"]
    if chat.template is not None:
        lines.append(f"TEMPLATE {quoted(chat.template)}")
    if chat.system:
        lines.append(f"SYSTEM {quoted(chat.system)}")
    lines += [f"PARAMETER stop {quoted(word)}" for word in stops]
    lines += [f"PARAMETER {name} {value:g}" for name, value in numbers.items()]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Return a value for a Modelfile; between three quotes nothing needs an escape.

    Raises:
        ExportError: the text contains three quotes, or ends with one, which a Modelfile cannot express.
    """
    if '"' not in text and "\n" not in text:
        return f'"{text}"'
    if '"""' in text or text.endswith('"'):
        raise ExportError(f"a Modelfile cannot hold this text because of its quotes: {text[:80]!r}")
    return f'"""{text}"""'


def stop_words(tokenizer: Any) -> list[str]:
    """Return the texts of the tokens that end a completion."""
    ids = sorted({*getattr(tokenizer, "eos_token_ids", ()), tokenizer.eos_token_id} - {None})
    return [str(tokenizer.convert_ids_to_tokens(int(i))) for i in ids]


def parameters(loaded: Loaded) -> dict[str, float]:
    """Return the sampling parameters of the base's generation_config.json."""
    given = generation_settings(loaded.path)
    if given.get("do_sample") is False:
        return {"temperature": 0.0}
    return {theirs: given[ours] for ours, theirs in _PARAMETERS.items() if isinstance(given.get(ours), (int, float))}


# Words that no template contains.
_SYSTEM, _FIRST, _ANSWER, _SECOND = "sysqx", "firstqx", "answerqx", "secondqx"


def _conversation(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


class _Pieces(NamedTuple):
    """The text around the messages of a conversation.

    Attributes:
        start, end: before the first user message, and after each one.
        reply, between: before a completion, and after it up to the next user message.
        before, after: around a system prompt before the first user message.
    """

    start: str
    end: str
    reply: str
    between: str
    before: str
    after: str

    def go(self) -> str:
        """Return Ollama's template, in which a system prompt is the first message, written with the next one."""
        start, end, answer, between, before, after = map(literal, self)
        with_system = f"{{{{ else if and $.System (eq $i 1) }}}}{before}{{{{ $.System }}}}{after}"
        opening = f"{{{{ if eq $i 0 }}}}{start}{with_system}{{{{ else }}}}{between}{{{{ end }}}}"
        user = f'{{{{ if eq .Role "user" }}}}{opening}{{{{ .Content }}}}{end}'
        reply = f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{{{{ end }}}}'
        return f"{{{{ range $i, $m := .Messages }}}}{user}{reply}{{{{ end }}}}"

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return what Go renders with that template."""
        out, system = "", ""
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "system":
                system = content
            elif role == "assistant":
                out += self.reply + content
            else:
                first = self.before + system + self.after if system and i == 1 else self.between
                out += (self.start if i == 0 else first) + content + self.end
        return out


def literal(text: str) -> str:
    """Return a Go action that prints a text, so that nothing in it is read as an action or trimmed."""
    # JSON's escapes are Go's too, once the braces of an action are escaped.
    quoted = json.dumps(text, ensure_ascii=False).replace("{", "\\u007b").replace("}", "\\u007d")
    return f"{{{{ {quoted} }}}}" if text else ""


def find_chat(tokenizer: Any) -> OllamaChat:
    """Return the Go template that renders like the tokenizer's Jinja template, and its default system prompt."""
    if chat_template(tokenizer) is None:
        return OllamaChat(None, None)
    plain = _jinja(tokenizer, _conversation(_FIRST, _ANSWER, _SECOND))
    if plain is None or any(plain.count(word) != 1 for word in (_FIRST, _ANSWER, _SECOND)):
        return OllamaChat(None, None)
    start, rest = plain.split(_FIRST)
    asked, rest = rest.split(_ANSWER)
    between, end = rest.split(_SECOND)
    if not asked.startswith(end):  # the completion's opening follows the end of the user message
        return OllamaChat(None, None)
    answer = asked.removeprefix(end)
    with_system = _jinja(tokenizer, _conversation(_FIRST, system=_SYSTEM)) or ""
    if with_system.count(_SYSTEM) == with_system.count(_FIRST) == 1 and _FIRST in with_system.split(_SYSTEM)[1]:
        before, rest = with_system.split(_SYSTEM)
        pieces = _Pieces(start, end, answer, between, before, rest.split(_FIRST)[0])
        if _agrees(tokenizer, pieces, (None, "Be brief.")):
            return OllamaChat(pieces.go(), _own_system(pieces))
    # No system prompts, or in a place that Go's template cannot express: they go before the first user message.
    pieces = _Pieces(start, end, answer, between, start, "\n\n")
    return OllamaChat(pieces.go() if _agrees(tokenizer, pieces, (None,)) else None, None)


def _own_system(pieces: _Pieces) -> str | None:
    """Return the system prompt that the template adds to a conversation without one, if a Modelfile can hold it."""
    start, before, after = pieces.start, pieces.before, pieces.after
    if not (start.startswith(before) and start.endswith(after)):
        return None
    own = start[len(before) : max(len(before), len(start) - len(after))]
    return own if own and '"""' not in own and not own.endswith('"') else None


def _agrees(tokenizer: Any, pieces: _Pieces, systems: Sequence[str | None]) -> bool:
    """Return whether Go and Jinja render the same text for conversations of several shapes."""
    texts = [("Who?",), ("Who?", "Me.", "Why?"), ("a b", "c", "d", "e\n\nf", "g {{ .System }}")]
    given = [_conversation(*turns, system=system) for system in systems for turns in texts]
    return all(pieces.text(messages) == _jinja(tokenizer, messages) for messages in given)


def _jinja(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """Return the rendered prompt, without the bos that llama.cpp adds; None if the template refuses."""
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template may raise anything
        return None
    bos = tokenizer.bos_token
    begins = bos is not None and list(tokenizer.encode("a"))[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if begins else text
