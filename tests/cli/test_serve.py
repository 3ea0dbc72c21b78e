"""mlxft serve and mlxft compare: several models over one base, and requests that may only name what is served."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from mlxft.errors import ConfigError
from mlxft.study import serve
from mlxft.study.compare import Bases, base_source, model_source, open_models

Command = Callable[..., Any]
SHORT = ("--max-tokens", "8")


@pytest.fixture
def two(write: Callable[..., str], mlxft: Command) -> tuple[str, str]:
    """Two runs of a few steps on one base, which complete prompts differently."""
    for name, lr in (("a", 0.05), ("b", 0.02)):
        assert mlxft("train", write(**{"run.steps": 3, "optim.lr": lr, "run.name": name})).code == 0
    return "runs/a", "runs/b"


@pytest.fixture
def wanted(two: tuple[str, str], mlxft: Command, tiny_model_dir: Path) -> dict[str, str]:
    """Name -> what mlxft generate completes."""
    sources = {"base": str(tiny_model_dir), "a": two[0], "b": two[1]}
    found = {n: mlxft("generate", "--model", m, "the in", *SHORT).out[:-1] for n, m in sources.items()}
    assert len(set(found.values())) == 3, "the models should differ"
    return found


@dataclass
class Client:
    """Asks the server."""

    port: int

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Return the status and the text of the response."""
        to = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else body if isinstance(body, str) else json.dumps(body)
        to.request(method, path, data, headers)
        found = to.getresponse()
        return found.status, found.read().decode()

    def chat(self, model: str, prompt: str = "the in", **more: Any) -> tuple[int, Any]:
        """Return the status and the completion, or the error's message."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 8, **more}
        status, text = self.send("POST", "/v1/chat/completions", body)
        if more.get("stream"):
            chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            return status, "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        found = json.loads(text)
        return status, found["choices"][0]["message"]["content"] if status == 200 else found["error"]["message"]


@pytest.fixture
def served(two: tuple[str, str], wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A server of base, a and b in this process."""
    bound, ready = serve._bound, threading.Event()
    servers: list[Any] = []

    def keep(host: str, port: int) -> Any:
        servers.append(bound(host, port))
        ready.set()
        return servers[0]

    monkeypatch.setattr(serve, "_bound", keep)
    models = open_models(["base", *two])
    thread = threading.Thread(target=serve.serve_models, args=(models, "127.0.0.1", 0))
    thread.start()
    assert ready.wait(60)
    yield Client(servers[0].server_address[1])
    servers[0].shutdown()
    thread.join()


def test_each_name_completes_as_generate_does(served: Client, wanted: dict[str, str]) -> None:
    for name in ("a", "b", "base", "a"):
        assert served.chat(name) == (200, wanted[name])
        assert served.chat(name, stream=True) == (200, wanted[name])
    prompts = [
        [{"role": role, "content": "of"}, {"role": "user", "content": "the in"}] for role in ("system", "developer")
    ]
    assert served.chat("a", messages=prompts[0]) == served.chat("a", messages=prompts[1])
    assert served.chat("b", seed=1) == (200, wanted["b"])  # without a batch
    asked = [threading.Thread(target=lambda n=n: found.append((n, served.chat(n)[1]))) for n in ("a", "b", "base", "b")]
    found: list[tuple[str, str]] = []
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert sorted(found) == sorted((n, wanted[n]) for n in ("a", "b", "base", "b"))


def test_a_request_only_names_what_is_served(served: Client, two: tuple[str, str], tiny_model_dir: Path) -> None:
    status, text = served.send("GET", "/v1/models")
    assert (status, [model["id"] for model in json.loads(text)["data"]]) == (200, ["base", "a", "b"])
    assert served.send("GET", "/v1/models/a")[0] == 200
    for name in (two[0], str(tiny_model_dir), "Qwen/Qwen3-0.6B", "c", "../runs/a"):
        assert served.chat(name)[0] == 404
        assert "there are base, a, b" in served.chat(name)[1]
    for field in ("adapters", "draft_model"):
        assert served.chat("a", **{field: two[1]}) == (
            400,
            f"{field}: a request only names one of the models in /v1/models",
        )
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}]
    assert "only texts" in served.chat("a", messages=image)[1]
    assert "messages[0].role" in served.chat("a", messages=[{"role": "user ", "content": "x"}])[1]
    assert served.chat("a", temperature=-1)[0] == 400
    assert served.send("POST", "/v1/nothing", {})[0] == served.send("GET", "/nothing")[0] == 404
    assert served.send("POST", "/v1/chat/completions", "{")[0] == 400


def test_web_pages_and_other_hosts_are_refused(served: Client) -> None:
    body = {"model": "a", "prompt": "the", "max_tokens": 1}
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Host": "evil.example:80"}):
        assert served.send("POST", "/v1/completions", body, **headers)[0] == 403
    assert served.send("GET", "/v1/models", Host="[::1]:80")[0] == 200
    assert served.send("POST", "/v1/completions", body, Host="localhost")[0] == 200
    assert served.send("POST", "/v1/completions", None, **{"Content-Length": str(10**12)})[0] == 413
    assert served.send("GET", "/health")[0] == 200


def test_a_base_is_in_memory_once(two: tuple[str, str], tiny_model_dir: Path) -> None:
    models = open_models([*two, "base", f"again={two[0]}", "tiny=" + str(tiny_model_dir)])
    assert list(models) == ["a", "b", "base", "again", "tiny"]
    assert len({id(model.loaded.model) for model in models.values()}) == 1
    arrays = []
    for name in ("a", "b", "base"):
        with models[name].active() as loaded:
            arrays.append({n: id(v) for n, v in tree_flatten(loaded.model.parameters()) if "lora" not in n})
    base = {n.replace(".linear.", ".") for n in arrays[0]}
    assert base == {n.replace(".linear.", ".") for n in arrays[1]} == set(arrays[2])
    assert set(arrays[0].values()) == set(arrays[1].values()) == set(arrays[2].values())


def test_one_base_at_a_time_and_what_has_changed_is_read_again(
    two: tuple[str, str], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """As the studio's playground holds them."""
    bases = Bases(most=1)
    a, b, bare = (bases.open(s) for s in (model_source(two[0]), model_source(two[1]), base_source([two[0]])))
    assert (a.name, b.name, bare.name) == ("a", "b", "base")
    assert a.roles is b.roles is bare.roles
    assert bases.open(model_source(two[0])).role == a.role
    weights = Path(two[0]) / "adapter" / "adapters.safetensors"
    os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 10**9))
    assert bases.open(model_source(two[0])).role not in (a.role, b.role)
    gone = weakref.ref(a.loaded.model)
    del a, b, bare
    bases.open(model_source(str(make_model_dir(tmp_path / "other"))))
    assert gone() is None


def test_what_cannot_be_opened_is_refused(two: tuple[str, str], refused: Command, tiny_model_dir: Path) -> None:
    assert "two models are called a" in refused(2, "serve", two[0], two[0])
    assert "whose base is meant" in refused(2, "serve", "base")
    assert "no such file" in refused(1, "serve", "runs/c")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port} is in use" in refused(2, "serve", str(tiny_model_dir), "--port", port)
    with pytest.raises(ConfigError, match="--host"):
        serve._bound("no.such.host.example", 0)


def test_ctrl_c_ends_it_and_the_completions_under_way(tiny_model_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlxft", "serve", str(tiny_model_dir), "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith(f"serving {tiny_model_dir.name} at http://127.0.0.1:")
        to = http.client.HTTPConnection("127.0.0.1", int(line.split(":")[2].split("/")[0]), timeout=60)
        endless = {"prompt": "the", "max_tokens": 10**6, "stream": True, "seed": 1, "logit_bias": {"2": -1e9}}
        to.request("POST", "/v1/completions", json.dumps(endless))
        assert to.getresponse().read(20)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
        assert server.stderr is not None
        assert server.stderr.read().strip().endswith("interrupted")


def test_compare_shows_completions_side_by_side(wanted: dict[str, str], mlxft: Command) -> None:
    done = mlxft("compare", "the in", "--models", "base,runs/a,runs/b", *SHORT, "--json")
    (found,) = json.loads(done.out)
    assert found == {"prompt": "the in", "completions": wanted}
    Path("prompts.jsonl").write_text('{"prompt": "the in"}\n{"prompt": [{"role": "user", "content": "of"}]}\n')
    rows = json.loads(mlxft("compare", "prompts.jsonl", "--models", "base,runs/b", *SHORT, "--json").out)
    assert rows[0]["completions"] == {"base": wanted["base"], "b": wanted["b"]}
    assert rows[1]["prompt"] == [{"role": "user", "content": "of"}]
    Path("prompts.txt").write_text("the in\n\nof\n")
    latest = json.loads(mlxft("compare", "prompts.txt", *SHORT, "--json").out)
    assert [list(row["completions"]) for row in latest] == [["base", "b"]] * 2
    assert latest[0] == rows[0]


@pytest.mark.parametrize(("width", "beside"), [(120, True), (50, False)])
def test_a_narrow_terminal_has_them_one_under_another(
    width: int, beside: bool, wanted: dict[str, str], mlxft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = mlxft("compare", "the in", "--models", "base,runs/a", *SHORT).out.splitlines()
    assert any(wanted["base"].strip() in line and wanted["a"].strip() in line for line in lines) is beside
    assert max(map(len, lines)) <= width


def test_without_a_run_compare_says_what_to_give(
    mlxft: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mlxft("compare", "hi")
    assert (done.code, "--models base,runs/a" in done.err) == (2, True)
