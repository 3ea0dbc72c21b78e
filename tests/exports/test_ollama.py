"""Ollama folders: the Go template gives the text of the model's Jinja template, and the Modelfile says it rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from go_template import render

from mlxft.errors import ConfigError, ExportError, ModelError
from mlxft.exports.ollama import OllamaChat, export_ollama, find_chat, literal, modelfile, quoted
from mlxft.model.load import load, load_tokenizer

# As the models' own tokenizer_config.json have them, shortened.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "llama31": "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "gemma2": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "gemma3": "{{ bos_token }}{% set p = '' %}{% if messages[0].role == 'system' %}"
    "{% set p = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + (p if loop.first else '') + "
    "m.content | trim + '<end_of_turn>\n' }}{% endfor %}{{ '<start_of_turn>model\n' }}",
    "phi3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
}
TAKES_SYSTEM = ("chatml", "llama3", "llama31", "gemma3", "phi3")


class Speaker:
    """A tokenizer as far as chats go."""

    def __init__(self, template: str | None, tokenizer: Any, add_bos: bool = False) -> None:
        self.chat_template, self.inner, self.add_bos = template, tokenizer, add_bos
        self.bos_token, self.bos_token_id = "<|endoftext|>", 0

    def encode(self, text: str) -> list[int]:
        return [self.bos_token_id] * self.add_bos + list(self.inner.encode(text))

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Any:
        tokens = {"bos_token": self.bos_token, "eos_token": "<|im_end|>"}
        return self.inner.apply_chat_template(messages, chat_template=self.chat_template, **options, **tokens)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_go_says_what_jinja_says(name: str, add_bos: bool, tiny_tokenizer: Any) -> None:
    """With and without a system prompt, over turns; the bos that llama.cpp adds is not written twice."""
    speaker = Speaker(TEMPLATES[name], tiny_tokenizer._tokenizer, add_bos)
    chat = find_chat(speaker)
    assert chat.template is not None
    turns = [("user", "What's 1 {{ .System }}?"), ("assistant", 'It is "one".'), ("user", "And\n\n2?")]
    for length in (1, 3):
        for system in (None, "Be kind.") if name in TAKES_SYSTEM else (None,):
            messages = [("system", system)] * (system is not None) + turns[:length]
            fields = [{"Role": role, "Content": text} for role, text in messages]
            given = [{"role": role, "content": text} for role, text in messages]
            want = speaker.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
            got = render(chat.template, {"Messages": fields, "System": system or ""})
            assert got == (want.removeprefix(speaker.bos_token) if add_bos else want)


def test_a_system_prompt_that_the_template_does_not_know(tiny_tokenizer: Any) -> None:
    """It goes before the first question."""
    chat = find_chat(Speaker(TEMPLATES["gemma2"], tiny_tokenizer._tokenizer, True))
    assert chat.template is not None
    messages = [{"Role": "system", "Content": "Be kind."}, {"Role": "user", "Content": "Who?"}]
    text = render(chat.template, {"Messages": messages, "System": "Be kind."})
    assert text == "<start_of_turn>user\nBe kind.\n\nWho?<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content | length }}|{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_templates_of_another_kind(template: str | None, tiny_tokenizer: Any) -> None:
    assert find_chat(Speaker(template, tiny_tokenizer._tokenizer)) == OllamaChat(None, None)


def test_smollm2s_modelfile(smollm2: Any) -> None:
    """Its template has a system prompt of its own."""
    mark, end = "<|im_start|>", "<|im_end|>\\n<|im_start|>"
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    template = (
        '{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}'
        f'{{{{ if eq $i 0 }}}}{{{{ "{mark}system\\n{own}{end}user\\n" }}}}'
        f'{{{{ else if and $.System (eq $i 1) }}}}{{{{ "{mark}system\\n" }}}}{{{{ $.System }}}}{{{{ "{end}user\\n" }}}}'
        f'{{{{ else }}}}{{{{ "{end}user\\n" }}}}{{{{ end }}}}{{{{ .Content }}}}{{{{ "{end}assistant\\n" }}}}'
        '{{ else if eq .Role "assistant" }}{{ .Content }}{{ end }}{{ end }}'
    )
    assert modelfile(find_chat(smollm2.tokenizer), ["<|im_end|>"], {"temperature": 0.7, "top_k": 40}) == (
        f'FROM ./model.gguf\nTEMPLATE """{template}"""\nSYSTEM "{own}"\nPARAMETER stop "<|im_end|>"\n'
        "PARAMETER temperature 0.7\nPARAMETER top_k 40\n"
    )


def test_the_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    said = export_ollama(tiny_model_dir, out, kind="q8_0")
    assert sorted(p.name for p in out.iterdir()) == [".mlxft.json", "Modelfile", "model.gguf"]
    assert said[-1] == f"next: ollama create tiny -f {out / 'Modelfile'}"
    text = (out / "Modelfile").read_text("utf-8")
    assert text.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    ids = mx.array([[5, 6, 7]])
    assert mx.allclose(load(str(out / "model.gguf")).model(ids), load(str(tiny_model_dir)).model(ids), atol=0.2)
    with pytest.raises(ConfigError, match=r"exists already; .*overwrite=True"):
        export_ollama(tiny_model_dir, out, kind="f16")
    assert "f16" in export_ollama(tiny_model_dir, out, kind="f16", overwrite=True)[0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not a folder for Ollama that this version of mlxft made"):
        export_ollama(tiny_model_dir, tmp_path / "mine", kind="f16", overwrite=True)
    with pytest.raises(ExportError, match="type 'q4' is not written"):
        export_ollama(tiny_model_dir, tmp_path / "other", kind="q4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "tiny"]


def test_settings_of_the_makers(make_model_dir: Any, tmp_path: Path) -> None:
    folder = make_model_dir(tmp_path / "m")
    settings = (
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [2, 0]}'
    )
    (folder / "generation_config.json").write_text(settings)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    said = export_ollama(folder, tmp_path / "out", kind="f16")
    assert any("has a chat template of its own kind: the Modelfile has no TEMPLATE" in line for line in said)
    assert (tmp_path / "out" / "Modelfile").read_text("utf-8") == (
        'FROM ./model.gguf\nPARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n'
        "PARAMETER temperature 0.6\nPARAMETER top_p 0.9\nPARAMETER repeat_penalty 1.1\n"
    )
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json: "):
        export_ollama(folder, tmp_path / "again", kind="f16")


def test_quotes() -> None:
    assert quoted("plain") == '"plain"'
    assert quoted('say "a"\nb') == '"""say "a"\nb"""'
    for text in ('a """ b', 'ends with "'):
        with pytest.raises(ExportError, match="cannot hold this text"):
            quoted(text)


def test_go_literals_and_what_is_not_go() -> None:
    for text in ('a "b" \\ {{ end }}\n\t}}', "", "äöü 🙂 \u2028"):
        assert render(literal(text), {}) == text
    data = {"Messages": [{"Role": "user", "Content": "x"}] * 2, "System": ""}
    assert render("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Content }}{{ end }}!", data) == "0x1x!"
    assert render('{{ if and $.System (eq 1 1) }}a{{ else if eq "b" "b" }}b{{ else }}c{{ end }}', data) == "b"
    for broken in ("{{ if eq 1 1 }}", "{{ end }}", "{{ range .Messages }}{{ end }}", "{{ printf 1 }}", "{{ $x }}"):
        with pytest.raises(ValueError, match=r"not known|not closed|closes nothing"):
            render(broken, data)


def test_load_tokenizer_is_enough(tiny_model_dir: Path) -> None:
    """The template is found with the tokenizer alone, as mlx-lm wraps it."""
    assert find_chat(load_tokenizer(str(tiny_model_dir))).template is not None
