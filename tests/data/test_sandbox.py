"""Chat templates are programs of strangers: none takes more than a rendering may, and sound ones are untouched."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.data.chat import Bounded, Chat, complete_template
from mlxft.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}]


def doubled(start: str, step: str) -> str:
    loop = f"{{% for i in range(60) %}}{{% set n.x = {step} %}}{{% endfor %}}"
    return f"{{% set n = namespace(x={start}) %}}{loop}{{{{ n.x }}}}"


HOSTILE = {
    "times": "{{ 'a' * 10**10 }}",
    "power": "{% set x = 99999 %}{{ x**x**x }}",
    "width": "{{ '%0999999999d' % 1 }}",
    "star": "{{ '%*d' % (999999999, 1) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "nested-format": "{{ '{:{}}'.format(1, 999999999) }}",
    "format-filter": "{{ '%0999999999d'|format(1) }}",
    "ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "text": doubled("'aaaa'", "n.x + n.x"),
    "tilde": doubled("'aaaa'", "n.x ~ n.x"),
    "list": doubled("['a']", "[n.x, n.x]"),
    "tuple": doubled("('a',)", "(n.x, n.x)"),
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "indent": "{{ ('a\n'*10000)|indent(99999) }}",
    "join": "{{ range(99999)|map('replace', 0, 'a'*99999)|join }}",
    "join-method": "{{ ('a'*99999).join(['b']*99999) }}",
    "replace": "{{ ('a'*99999).replace('a', 'b'*99999) }}",
    "translate": "{{ ('a'*99999).translate({97: 'b'*99999}) }}",
    "tojson": "{{ [1, 2]|tojson(indent=999999999) }}",
    "round": "{{ 1|round(999999999, 'ceil') }}",
    "slice": "{{ 'a'|slice(999999999)|list|length }}",
    "block": "{% filter center(999999999) %}a{% endfilter %}",
    "sort": "{% for i in range(9) %}{{ ('a'*99999*99)|sort|length }}{% endfor %}",
    "urlize": "{{ ('http://a.b '*99999)|urlize }}",
    "literal": "{% for i in range(99999) %}" + "x" * 200_000 + "{% endfor %}",
    "brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "long": "x" * 10**6,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_out_of_bounds_is_refused(kind: str, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxft.data.chat.BUDGET", 1 << 25)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    for _ in range(3):  # it is asked again for each row and form
        with pytest.raises(DataError, match="chat template"):
            Chat(_with(tiny_tokenizer, HOSTILE[kind]), None, "").render(MESSAGES)
    assert time.monotonic() - start < 30
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown / (1 << 30 if sys.platform == "darwin" else 1 << 20) < 0.5  # GiB


class _with:
    """A tokenizer with another template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.chat_template, self._tokenizer = template, tokenizer

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer.apply_chat_template(*args, **{"chat_template": self.chat_template, **kwargs})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages|tojson(indent=2)|length > 9 }}{{ messages[0]|tojson }}", 'True{"role": "user", "content": "hi"}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
        ("{% set n = namespace() %}{% for m in messages %}{% set n.t = m.role ~ 1 %}{% endfor %}{{ n.t }}", "user1"),
        ("{% macro m(x, y=2) %}{{ x * y }}-{{ '%s:%d' % (x, y) }}{% endmacro %}{{ m('ab') }}", "abab-ab:2"),
        ("{{ ['a', 'b']|join(', ') }}{{ 'x'.join('ab') }}{{ 'a b'.split()|list }}", "a, baxb['a', 'b']"),
        ("{{ messages|map(attribute='role')|list|length + 2**3 }}{{ 'ab'|replace('a', 'c')|upper }}", "9CB"),
        ("{% set a, b = (1, 2) %}{{ a == 1 and b in [2] }}{{ undefined_name }}", "True"),
        ("{{ strftime_now('%Y')|length }}{{ 'content: {}'.format(messages[0]['content']) }}", "4content: hi"),
        ("{{ '123456789 %'.strip() + 'a' }}{{ '%.2f' % 1732723200 }}", "123456789 %a1732723200.00"),
    ],
)  # fmt: skip
def test_sound_templates_are_rendered_as_before(template: str, text: str, tiny_tokenizer: Any) -> None:
    assert Chat(_with(tiny_tokenizer, template), None, "").render(MESSAGES) == text


def test_transformers_itself_renders_in_bounds(tiny_tokenizer: Any) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    complete_template(tiny_tokenizer)
    assert isinstance(_compile_jinja_template("x").environment, Bounded)


@pytest.mark.parametrize("command", ["check", "train", "generate", "chat", "eval"])
def test_every_command_refuses(
    command: str,
    tmp_path: Path,
    make_model_dir: Callable[..., Path],
    recipe: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error in seconds, and no more memory than before."""
    import yaml
    from click.testing import CliRunner

    from mlxft.cli import cli

    monkeypatch.chdir(tmp_path)
    model = make_model_dir(tmp_path / "model")
    (model / "chat_template.jinja").write_text(HOSTILE["times"], "utf-8")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(**{"model.path": str(model)})), "utf-8")
    arguments = {
        "check": ["check", "r.yaml"],
        "train": ["train", "r.yaml"],
        "generate": ["generate", "--model", "model", "hi"],
        "chat": ["chat", "--model", "model"],
        "eval": ["eval", "model", "rows-10.jsonl"],
    }[command]
    result = CliRunner().invoke(cli, arguments, input="hi\n")
    assert isinstance(result.exception, DataError), result
    assert "chat template" in str(result.exception)
