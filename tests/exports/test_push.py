"""mlxft push: what goes, what stays, the card, and the upload to a hub of our own on 127.0.0.1."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.errors import ConfigError, ExportError, ModelError
from mlxft.exports.fuse import fuse_sources
from mlxft.exports.hub import (
    Base,
    Facts,
    card,
    check_repo,
    find_base,
    folder_licence,
    front_matter,
    pack,
    recipe,
    results,
    shortened,
    upload,
)
from mlxft.model.sampling import Sampling, complete
from mlxft.run import train
from mlxft.runs import Run, load_run
from mlxft.study.plots import curves

TOKEN = "hf_" + "s3cret" * 5


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push needs. Weights go by LFS, all else within the commit."""

    server: Any

    def log_message(self, *args: Any) -> None: ...

    def _answer(self, code: int, body: Any = None, **headers: str) -> None:
        data = json.dumps(body if body is not None else {}).encode()
        self.send_response(code)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _refused(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials in header")
            return True
        return False

    def do_GET(self) -> None:
        if self._refused():
            return
        repo = self.path.removeprefix("/api/models/").split("?")[0]
        private = self.server.repos.get(repo)
        if private is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            known = {"id": repo, "private": private, "siblings": [], "tags": [], "sha": "0" * 40}
            self._answer(200, known | {"cardData": {"license": "gemma", "tags": ["x"]}})

    def do_PUT(self) -> None:
        data = self._body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer(200)

    def do_POST(self) -> None:
        data = self._body()
        if self._refused():
            return
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization']}/{asked['name']}" if "organization" in asked else asked["name"]
            if repo.startswith("others/"):
                self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
                return
            if repo in self.server.repos:
                self._answer(409, {"error": "You already created this model repo"})
                return
            self.server.repos[repo] = asked.get("private", asked.get("visibility") == "private")
            self._answer(200, {"url": f"{address}/{repo}"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"]} for f in json.loads(data)["files"]]
            for file in files:
                mode = "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular"
                file |= {"uploadMode": mode, "shouldIgnore": False, "oid": None}
            self._answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            for o in objects:
                o["actions"] = {"upload": {"href": f"{address}/blob/{o['oid']}"}}
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif self.path == "/api/validate-yaml":
            wrong = "license: none of your business" in json.loads(data)["content"]
            self._answer(400 if wrong else 200, {"errors": [{"message": "no such license"}] * wrong, "warnings": []})
        else:
            self.server.commits.append([json.loads(line) for line in data.splitlines()])
            oid = "1" * 40
            self._answer(200, {"commitUrl": f"{address}/ada/tuned/commit/{oid}", "commitOid": oid, "success": True})


@pytest.fixture
def hub() -> Iterator[Any]:
    """Our hub: .repos (name -> private), .blobs (sha256 -> bytes), .commits, .env for a process that talks to it."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.blobs, server.commits = {"ada/taken": True, "ada/open": False}, {}, []
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": TOKEN}
    server.env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def committed(hub: Any) -> dict[str, bytes]:
    """The files of the one commit that arrived."""
    (lines,) = hub.commits
    found = {}
    for line in lines[1:]:
        value = line["value"]
        whole = line["key"] == "file"
        found[value["path"]] = base64.b64decode(value["content"]) if whole else hub.blobs[value["oid"]]
    return found


@pytest.fixture(scope="module")
def run(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A LoRA run of a local base, with validations; what must not leave lies within."""
    place = tmp_path_factory.mktemp("push")
    base = make_model_dir(place / "secret-home" / "tiny")
    (base / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Tiny\n")
    turns = [{"role": "user", "content": "the in"}, {"role": "assistant", "content": "and or"}]
    (place / "rows.jsonl").write_text(8 * f"{json.dumps({'messages': turns})}\n")
    settings = {
        "model": {"path": str(base), "dtype": "float32"},
        "tune": {"rank": 4, "alpha": 8},
        "data": {"train": str(place / "rows.jsonl"), "valid": 0.25, "format": "messages"},
        "batch": {"rows": 2},
        "optim": {"lr": 0.05},
        "run": {"dir": str(place / "runs"), "name": "a", "steps": 4, "report_every": 1, "eval_every": 2, "seed": 7},
    }
    return train(settings)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Any]:
    def call(*args: object, **env: str) -> Any:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [Path(sys.executable).parent / "mlxft", "push", *map(str, args)],
            capture_output=True,
            text=True,
            env=clean | home | env,
            timeout=300,
        )

    return call


def parsed(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card, as huggingface_hub reads it."""
    from huggingface_hub import ModelCard

    read = ModelCard(text)
    assert read.data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    return read.data.to_dict(), read.text


def test_the_dry_run_needs_no_network_and_no_token(run: Run, command: Any) -> None:
    done = command(run.dir, "ada/tuned", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    *files, total = re.findall(r"^ +[\d,.]+ k?B  (\S+)$", done.stdout, re.MULTILINE)
    assert total == "total"
    assert files == [
        "README.md",
        "adapter_config.json",
        "adapters.safetensors",
        "chat_template.jinja",
        "curves.png",
    ]
    assert "would push to https://huggingface.co/ada/tuned (private)" in done.stdout
    assert "\nREADME.md:\n\n---\nlibrary_name: mlx\n" in done.stdout
    assert "ConfigError: REPO: 'ada' must be OWNER/NAME" in command(run.dir, "ada").stderr
    told = json.loads(command(run.dir, "ada/tuned", "--dry-run", "--json").stdout)
    assert told["commit"] is None
    assert told["card"] in done.stdout
    sizes = {f["path"]: f["bytes"] for f in told["files"]}
    assert sizes["adapters.safetensors"] == (run.result / "adapters.safetensors").stat().st_size
    assert sizes["README.md"] == len(told["card"].encode())


def test_the_card_says_what_the_run_was(run: Run) -> None:
    data, text = parsed(pack(run.dir, "ada/tuned", draw=curves).card)
    assert data["license"] == "mit"
    assert data["tags"] == ["mlx", "mlxft", "sft", "lora"]
    assert (data["pipeline_tag"], "base_model" in data, "datasets" in data) == ("text-generation", False, False)
    assert "A LoRA adapter for a local copy of `tiny`, by supervised fine-tuning" in text
    (start,), evals = run.metrics("start"), run.metrics("eval")
    assert f"| tokens | {start['data']['tokens']:,} |" in text
    assert "| seed | 7 |" in text
    assert "| steps | 4 of 4 |" in text
    assert "| data | `rows.jsonl` |" in text
    best = max(e["step"] for e in evals if e["best"])
    for event in evals:
        mark = "**" if event["step"] == best else ""
        assert f"| {mark}{event['step']}{mark} | {mark}{event['loss']:.4g}{mark} |" in text
    written = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert written["tune"] == {"rank": 4, "alpha": 8.0}
    assert written["model"] == {"path": "tiny", "dtype": "float32"}
    assert "![Curves of the training run](curves.png)" in text


def test_nothing_of_this_machine_leaves(run: Run) -> None:
    (run.result / "rows.jsonl").write_text('{"text": "private"}\n')
    (run.result / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    (run.result / "trainer_state.json").write_text("{}")
    try:
        shipment = pack(run.dir, "ada/tuned", draw=curves)
    finally:
        for name in ("rows.jsonl", ".env", "trainer_state.json"):
            (run.result / name).unlink()
    assert set(shipment.left_out) == {"rows.jsonl", ".env", "trainer_state.json"}
    for content in shipment.files.values():
        data = content if isinstance(content, bytes) else content.read_bytes()
        for secret in (b"secret-home", str(run.dir.parent).encode(), TOKEN.encode()):
            assert secret not in data
    about = json.loads(shipment.files["adapter_config.json"])
    assert about["mlxft"]["base"]["model"] == "tiny"
    own = json.loads((run.result / "adapter_config.json").read_text())
    assert own["mlxft"]["base"]["model"].startswith("/"), "the run itself keeps its path"
    about["mlxft"]["base"]["model"] = own["mlxft"]["base"]["model"]
    assert about == own, "nothing else is changed"


def test_a_push_arrives_to_the_byte(run: Run, hub: Any, command: Any) -> None:
    done = command(run.dir, "ada/tuned", "--message", "First", **hub.env)
    assert done.returncode == 0, done.stderr
    assert hub.repos["ada/tuned"] is True, "private by default"
    assert hub.commits[0][0]["value"]["summary"] == "First"
    shipment, arrived = pack(run.dir, "ada/tuned", draw=curves), committed(hub)
    assert set(arrived) == set(shipment.files)
    for name, content in shipment.files.items():
        assert arrived[name] == (content if isinstance(content, bytes) else content.read_bytes()), name
    assert f"commit: {hub.env['HF_ENDPOINT']}/ada/tuned/commit/111" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert not [p for p in run.dir.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


@pytest.fixture
def send(run: Run, hub: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`send("ada/x", public=True, HF_TOKEN="...")`: the run to our hub, from this process."""
    from huggingface_hub import constants

    def call(
        repo: str, public: bool = False, update: bool = False, licence: str = "mit", message: str = "m", **env: str
    ) -> str:
        for key, value in (hub.env | env).items():
            if key == "HF_TOKEN":
                monkeypatch.setenv(key, value)
        monkeypatch.setattr(constants, "ENDPOINT", env.get("HF_ENDPOINT", hub.env["HF_ENDPOINT"]))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", env.get("HF_HUB_OFFLINE") == "1")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no such file")
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", "no such file")
        return upload(pack(run.dir, repo, licence=licence), public=public, update=update, message=message)

    return call


# Raised by huggingface_hub within httpx while it uploads.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_public_and_update_are_said_aloud(send: Callable[..., str], hub: Any) -> None:
    with pytest.raises(ExportError, match=r"ada/taken is taken: choose another name, or give --update"):
        send("ada/taken")
    with pytest.raises(ExportError, match="exists and is public: confirm with --public"):
        send("ada/open", update=True)
    assert hub.commits == []
    send("ada/taken", update=True)
    send("ada/new", public=True)
    assert hub.repos["ada/new"] is False
    assert len(hub.commits) == 2


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_hubs_refusals_are_told(send: Callable[..., str], hub: Any) -> None:
    for said, env in (
        ("there is no Hugging Face token: set HF_TOKEN, or log in with: hf auth login", {"HF_TOKEN": ""}),
        ("the token was not accepted", {"HF_TOKEN": "hf_wrong"}),
        (r"the hub is switched off \(HF_HUB_OFFLINE is set\)", {"HF_HUB_OFFLINE": "1"}),
    ):
        with pytest.raises(ExportError, match=f"^{said}"):
            send("ada/tuned", **env)
    with pytest.raises(ExportError, match="the token may not write to others"):
        send("others/x")
    with pytest.raises(ConfigError, match="--message: is empty"):
        send("ada/tuned", message=" ")
    assert "ada/tuned" not in hub.repos
    with pytest.raises(ExportError, match=r"no such license.*was made, its files did not arrive.*push with --update"):
        send("ada/tuned", licence="none of your business")
    assert hub.commits == []


def test_no_network_is_told(run: Run, command: Any) -> None:
    done = command(run.dir, "ada/tuned", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0")
    assert done.returncode == 1
    assert done.stderr.startswith("ExportError: http://127.0.0.1:9 cannot be reached or fails (")
    assert "nothing was pushed" in done.stderr
    assert TOKEN not in done.stderr


@pytest.mark.parametrize("repo", ["ada", "a/b/c", "ada/x y", "ada/x..y", "ada/-x", "../x", "ada/" + "x" * 100])
def test_bad_names_are_refused_at_once(repo: str) -> None:
    with pytest.raises(ConfigError, match="REPO: "):
        check_repo(repo)


def test_what_can_not_be_pushed(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such run or folder"):
        pack(tmp_path / "nope", "ada/x")
    with pytest.raises(ModelError, match="there is nothing to push: no run"):
        pack(tmp_path, "ada/x")
    with pytest.raises(ExportError, match="has adapter/ only; fuse it first: mlxft fuse"):
        pack(run.dir, "ada/x", what="model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weights"):
        pack(tmp_path, "ada/x")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        pack(tmp_path, "ada/x")


@pytest.mark.parametrize("line", ['{"event": "train", "step": 1}', '{"event": "start", "data": 3}', "[" * 100_000])
def test_events_that_were_altered_are_named_by_their_file(run: Run, tmp_path: Path, line: str) -> None:
    copy = Path(shutil.copytree(run.dir, tmp_path / "copy"))
    (copy / "metrics.jsonl").write_text(line + "\n", "utf-8")
    if line.startswith("["):  # left out, as what a kill has cut short
        pack(copy, "ada/a")
    else:
        with pytest.raises(ModelError, match=r"metrics\.jsonl cannot be read"):
            pack(copy, "ada/a")


def test_a_fused_folder_goes_as_it_is(run: Run, tmp_path: Path) -> None:
    fuse_sources(run.dir, tmp_path / "fused")
    bare = pack(tmp_path / "fused", "ada/fused")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(bare.files)
    assert any("--run RUN puts its data" in note for note in bare.notes)
    known = pack(tmp_path / "fused", "ada/fused", run=run.dir, what="model", draw=curves)
    text = parsed(known.card)[1]
    assert "A fused LoRA fine-tune of a local copy of `tiny`" in text
    assert "mlx_lm.generate --model fused" in text
    assert 'AutoModelForCausalLM.from_pretrained("ada/fused")' in text
    (tmp_path / "fused" / "README.md").write_text("# Mine\n")
    assert pack(tmp_path / "fused", "ada/fused").card == "# Mine\n"
    (tmp_path / "card.md").write_text("# Another\n")
    assert pack(run.dir, "ada/x", own_card=tmp_path / "card.md").files["README.md"] == b"# Another\n"


def test_what_arrives_answers_as_the_run(run: Run, tmp_path: Path) -> None:
    for name, content in pack(run.dir, "ada/tuned").files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    ask = Sampling(8, temperature=0.0)
    base = run.config.model.path
    arrived, own = load_run(base, adapter=tmp_path), load_run(run)
    told = [complete(m.model, m.tokenizer, "the in", ask) for m in (arrived, own)]
    assert told[0] == told[1]
    assert told[0] != complete(load_run(base).model, own.tokenizer, "the in", ask)


def test_without_matplotlib_the_card_has_no_picture(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shipment = pack(run.dir, "ada/tuned", draw=curves)
    assert "curves.png" not in shipment.files
    assert "curves.png" not in shipment.card
    assert any("pip install 'mlxft[plots]'" in note for note in shipment.notes)


def test_base_and_licence(tmp_path: Path) -> None:
    smol = find_base("smollm2-135m")
    assert smol == Base("HuggingFaceTB/SmolLM2-135M-Instruct", smol.hub, {"license": "apache-2.0"}, "smollm2-135m")
    cached = tmp_path / "models--org--name" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "LICENSE").write_text("Apache License\n   Version 2.0, January 2004\n")
    assert find_base(str(cached)) == Base("org/name", "org/name", {"license": "apache-2.0"})
    (cached / "LICENSE").write_text("Do as you are told.")
    assert folder_licence(cached)["license"] == "other"
    (cached / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\nlicense_link: https://x.y\n---\n")
    assert folder_licence(cached) == {"license": "other", "license_name": "gemma", "license_link": "https://x.y"}
    (cached / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n")
    assert folder_licence(cached) == {"license": "mit"}
    for unreadable in (b"---\nlicense: [\n---\n", b"---\n- mit\n---\n", b"---\nlicense: \xff\n---\n", b"no metadata"):
        (cached / "README.md").write_bytes(unreadable)
        assert folder_licence(cached)["license"] == "other"
    assert find_base("/gone/away/base").name == "a local copy of `base`"
    assert find_base("/gone/away/base", "mit").licence == {"license": "mit"}


def test_the_licence_of_a_hub_model_is_asked_for(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.env["HF_ENDPOINT"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_base("ada/open") == Base("ada/open", "ada/open", {"license": "gemma"})
    assert find_base("ada/open", "mit") == Base("ada/open", "ada/open", {"license": "mit"})
    assert find_base("ada/unknown") == Base("ada/unknown", "ada/unknown")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_base("ada/open") == Base("ada/open", "ada/open")


def test_metadata_of_other_kinds() -> None:
    base = Base("org/base", "org/base", {"license": "mit"})

    def meta(kind: str, **more: Any) -> Any:
        return front_matter(Facts("ada/x", kind, base, **more))

    assert meta("adapter")["base_model_relation"] == "adapter"
    assert meta("model")["base_model_relation"] == "finetune"
    assert meta("gguf", files=["x.gguf"])["library_name"] == "gguf"
    assert meta("classifier", scores=True)["pipeline_tag"] == "text-classification"
    usage = card(Facts("ada/x", "gguf", base, files=["Modelfile", "x-f16.gguf"]))
    assert "llama-cli -m x/x-f16.gguf" in usage
    assert "ollama create x -f x/Modelfile" in usage
    assert 'PeftModel.from_pretrained(model, "ada/x")' in card(Facts("ada/x", "peft", base))
    assert "mlxft score x answers.jsonl" in card(Facts("ada/x", "adapter", base, scores=True))


def test_evaluations_stand_in_the_card(run: Run) -> None:
    figures = {"loss": {"value": 1.25, "se": 0.5, "n": 1200}}
    paired = [{"metric": "loss", "difference": -0.5, "low": -0.75, "high": -0.25}]
    task = {"task": "loss", "figures": figures, "against": figures, "paired": paired}
    result = {"model": str(run.dir), "file": "/secret-home/test.jsonl", "against": "base", "tasks": [task]}
    place = run.dir / "eval" / "test"
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps(result))
    (run.dir / "eval" / "cut").mkdir()
    (run.dir / "eval" / "cut" / "results.json").write_text('{"tasks": [')
    shipment = pack(run.dir, "ada/x")
    shutil.rmtree(run.dir / "eval")
    assert "| test.jsonl (1,200 rows) | loss | 1.25 ± 0.5 | -0.5 [-0.75, -0.25] to base |" in shipment.card
    assert "secret-home" not in shipment.card
    assert set(shipment.files) == {"README.md", "adapter_config.json", "adapters.safetensors", "chat_template.jinja"}


def test_preference_training_is_called_by_its_loss(run: Run) -> None:
    from mlxft.config import parse_config

    settings = {"objective": "preference", "preference": {"loss": "ipo"}, "model": {"path": "org/base"}}
    config = parse_config(settings | {"data": {"train": "x.jsonl", "format": "preference"}})
    facts = Facts("ada/x", "adapter", None, config=config)
    assert front_matter(facts)["tags"] == ["mlx", "mlxft", "ipo", "lora"]
    assert ", by IPO with mlxft" in card(facts)


def test_a_run_that_went_on_is_called_by_its_adapter(run: Run) -> None:
    model = run.config.model.model_copy(update={"adapter": "/secret-home/runs/first"})
    config = run.config.model_copy(update={"model": model})
    text = card(Facts("ada/x", "adapter", None, config=config, method="dora"))
    assert "A DoRA adapter for" in text
    assert "| went on from | the run or adapter `first` |" in text
    assert "secret-home" not in text


def test_data_sets_of_the_hub_are_linked(run: Run) -> None:
    data = run.config.data.model_copy(update={"train": "hf:org/rows:main:train", "valid": "hf:org/rows:main:test"})
    config = run.config.model_copy(update={"data": data})
    facts = Facts("ada/x", "adapter", None, config=config, events=run.metrics())
    assert front_matter(facts)["datasets"] == ["org/rows"]
    assert "| data | [org/rows](https://huggingface.co/datasets/org/rows) (main, train) |" in card(facts)
    assert yaml.safe_load(recipe(config))["data"]["train"] == "hf:org/rows:main:train"


def test_nothing_put_into_a_card_becomes_html_markdown_or_yaml(run: Run) -> None:
    bad = "x`|](http://evil)\n---\nlicense: mit\n```\n<script>alert(1)</script> **b** ![i](u)\u202e\x1b[2J"
    name = bad.replace("/", "")
    licence = {"license": "other", "license_name": bad, "license_link": bad}
    data = run.config.data.model_copy(update={"train": f"hf:{bad}", "valid": f"/{name}"})
    model = run.config.model.model_copy(update={"path": f"/models--a](u)--{name}/snapshots/1", "adapter": f"/{name}"})
    settings = run.config.run.model_copy(update={"sample_prompts": [bad]})
    update = {"data": data, "model": model, "run": settings, "versions": {bad: bad}}
    start = next(e for e in run.metrics() if e["event"] == "start") | {"data": {bad: bad, "rows": 1}}
    figure = {"value": 1.0, "se": 0.1, "n": 2}
    measured = {"file": name, "against": None, "tasks": [{"figures": {bad: figure}}]}
    base = find_base(model.path)
    assert base is not None
    base = Base(base.name, base.hub, licence)
    config = run.config.model_copy(update=update)
    text = card(Facts("ada/x", "adapter", base, config=config, events=[start], evaluations=[measured]))
    head, body = parsed(text)
    assert head["license_name"].startswith("x`|](http://evil) --- license: mit ```")
    assert "datasets" not in head
    assert "base_model" not in head
    from markdown_it import MarkdownIt

    shown = MarkdownIt("commonmark").enable("table").render(body)
    assert "<script" not in shown
    assert "<img" not in shown
    assert 'evil"' not in shown
    assert "\u202e" not in body
    assert "\x1b" not in body
    assert shown.count("<h1>") == 1
    assert re.findall("<h2>(.*?)</h2>", shown) == ["How to use it", "Training", "Recipe", "Licence and limits"]


def test_long_runs_have_short_tables() -> None:
    events = [{"event": "eval", "step": i, "loss": 9.0 - i / 10, "best": i == 41} for i in range(50)]
    lines = results(events).split("\n\n")[0].splitlines()
    assert len(lines) == 2 + 13, "twelve and the best"
    assert "| **41** | **4.9** |" in lines
    assert lines[2].startswith("| 0 ")
    assert lines[-1].startswith("| 49 ")
    assert results([]) == ""
    rollouts = [{"event": "rollout", "step": 1, "reward": 0.5, "kl": 0.1}, {"event": "train", "step": 1, "loss": 3.0}]
    assert results(rollouts).splitlines()[0] == "| step | training reward | training kl |"


@pytest.mark.parametrize(
    ("value", "short"),
    [
        ("/Users/ada/data/rows.jsonl", "rows.jsonl"),
        ("~/data/rows.jsonl", "rows.jsonl"),
        ("../rows.jsonl", "rows.jsonl"),
        ("/Users/ada/f.py:score", "f.py:score"),
        ("C:\\data\\rows.jsonl", "rows.jsonl"),
        ("org/name", "org/name"),
        ("hf:org/name", "hf:org/name"),
        ("model.layers.*", "model.layers.*"),
        ({"a": ["/x/y/z", 3, None]}, {"a": ["z", 3, None]}),
        ({"added_tokens_decoder": {"1": {"content": "/a/b"}}}, {"added_tokens_decoder": {"1": {"content": "/a/b"}}}),
    ],
)
def test_paths_are_cut(value: Any, short: Any) -> None:
    assert shortened(value) == short
