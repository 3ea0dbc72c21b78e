"""Who may ask a studio, what its pages show, and that what comes from rows, names and requests stays text."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from serving import EVIL, fill
from starlette.testclient import TestClient

from mlxft.errors import ConfigError
from mlxft.studio.app import Studio, open_port
from mlxft.studio.work import LOCK, Bin, Workplace, bins, charts
from mlxft.study.plots import panels

PAGES = ("/", "/run?run=runs/a", "/run/live?run=runs/a", "/run/report?run=runs/a", "/data", "/playground", "/label")


def make_run(folder: Path, name: str, **start: Any) -> Path:
    """Write the files of a finished run."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"objective: sft\nmodel:\n  path: {json.dumps(EVIL)}\nversions: {{}}\n", "utf-8")
    events: list[dict[str, Any]] = [
        {"event": "start", "step": 0, "objective": "sft", "base": EVIL, "steps": 4, **start}
    ]
    events += [{"event": "train", "step": n, "loss": 1 / n, "lr": 0.1} for n in range(1, 5)]
    events += [{"event": "sample", "step": 4, "prompt": EVIL, "answer": f"{EVIL}\x1b[2J"}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), "utf-8")
    status = {"status": "failed", "error": EVIL, "pid": 1, "host": "x", "started": "2026-01-01T00:00:00+00:00"}
    (run / "status.json").write_text(json.dumps(status), "utf-8")
    return run


def test_only_the_browser_with_the_token_gets_in(studio: Studio) -> None:
    with TestClient(studio.app("secret", "c"), base_url="http://127.0.0.1:1", follow_redirects=False) as client:
        for path in (*PAGES, "/static/studio.js", "/nowhere"):
            reply = client.get(path)
            assert (reply.status_code, "with its token" in reply.text) == (401, True), path
        assert client.get("/?token=secre").status_code == 403
        assert client.get("/run?token=secret").status_code == 401  # at the front door only
        assert client.get("/", headers={"Cookie": "c=secret"}).status_code == 401  # the cookie is not the token
        opened = client.get("/?token=secret")
        assert (opened.status_code, opened.headers["location"]) == (303, "/")
        cookie = opened.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert client.get("/").status_code == 200


def test_other_hosts_origins_methods_and_sizes_are_refused(client: TestClient) -> None:
    for host in (
        "evil.example",
        "127.0.0.1.evil.example:1",
        "evil.example:1",
        "127.0.0.1@evil.example",
        "",
        "0.0.0.0:1",
    ):
        assert client.get("/", headers={"host": host}).status_code == 403, host
    assert client.get("/", headers={"host": "localhost:9", "origin": "http://localhost:9"}).status_code == 200  # ssh -L
    for origin in ("http://evil.example", "null", "https://127.0.0.1:1", "http://127.0.0.1:2"):
        assert client.post("/stop", data={"run": "a"}, headers={"origin": origin}).status_code == 403, origin
        assert client.get("/", headers={"origin": origin}).status_code == 403, origin
    del client.headers["origin"]
    for site in ("cross-site", "same-site"):  # the second: a page of another port of this machine
        assert client.get("/", headers={"sec-fetch-site": site}).status_code == 403
    assert client.get("/", headers={"sec-fetch-site": "none"}).status_code == 200
    assert client.post("/stop", data={"run": "a"}).status_code == 403
    assert client.post("/stop", data={"run": "a"}, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.post("/stop", data={"run": "a"}, headers={"sec-fetch-site": "same-origin"}).status_code == 400
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert client.request(method, "/").status_code == 405, method
    client.headers["origin"] = "http://127.0.0.1:1"
    assert client.get("/stop").status_code == 405  # nothing changes by GET
    assert client.post("/start", content=b"x" * ((1 << 20) + 1)).status_code == 413
    assert client.post("/start", content=(b"x" * (1 << 19) for _ in range(3))).status_code == 413
    assert client.get(f"/?x={'x' * 9000}").status_code == 414


def test_every_reply_forbids_scripts_and_frames(client: TestClient, tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    for path in (*PAGES, "/nowhere", "/static/studio.js"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe-eval" not in policy
        assert ("unsafe-inline" in policy) == ("report" in path)
        assert "script-src 'unsafe-inline'" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


def test_paths_outside_are_refused(
    client: TestClient, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    secret = outside / "secret.jsonl"
    secret.write_text('{"text": "a secret"}\n', "utf-8")
    make_run(outside, "b")
    (tmp_path / "link.jsonl").symlink_to(secret)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(outside / "runs" / "b")
    half = make_run(tmp_path, "half")
    (half / "config.yaml").unlink()
    (half / "config.yaml").symlink_to(secret)
    up = "../" * 12
    for name in (str(secret), f"{up}{str(secret)[1:]}", "link.jsonl", "..", "~", "/etc/passwd", "runs/../../x", "a\0b"):
        for path, key in (("/data", "file"), ("/data", "recipe"), ("/run", "run"), ("/run/report", "run")):
            reply = client.get(path, params={key: name})
            assert reply.status_code == 400, (path, name)
            assert "a secret" not in reply.text
        for path, fields in (
            ("/start", {"recipe": name}),
            ("/stop", {"run": name}),
            ("/label/open", {"prompts": name}),
        ):
            assert client.post(path, data=fields).status_code == 400, (path, name)
    for name in ("runs/linked", "runs/half"):
        assert "outside the working folder" in client.get("/run", params={"run": name}).text
    assert "runs/linked" not in client.get("/").text
    fill(tmp_path)
    assert "link.jsonl" not in client.get("/data").text
    for text in (
        f"data.train={secret}",
        f"run.dir={outside}",
        "data.train=[../x]",
        f"data.mix={{a: {{path: {secret}}}}}",
    ):
        assert "is outside" in client.post("/start", data={"recipe": "recipe.yaml", "set": text}).text, text
        assert "is outside" in client.get("/data", params={"recipe": "recipe.yaml", "set": text}).text, text
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2f..%2ferrors.py"):
        assert client.get(path).status_code == 404, path
    with pytest.raises(ConfigError, match="is outside"):
        Workplace(tmp_path, "../runs")


def test_texts_of_runs_rows_and_requests_stay_texts(client: TestClient, tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", steps=8)
    fill(tmp_path)
    (tmp_path / "runs" / "<img src=x onerror=alert(1)>").mkdir()
    (tmp_path / "runs" / "<img src=x onerror=alert(1)>" / "config.yaml").write_text("a: [", "utf-8")
    pages = (*PAGES, "/compare?run=runs/a&run=runs/b", "/data?file=ab.jsonl", "/data?file=rows.jsonl")
    for path in (*pages, f"/run?run={EVIL}", f"/{EVIL}", f"/label?out=x&prompts={EVIL}"):
        text = client.get(path).text
        assert "<script>document" not in text, path
        assert "<img" not in text, path
        assert "\x1b" not in text, path
    assert "&lt;script&gt;" in client.get("/run?run=runs/a").text
    assert "1 to 4" not in client.get("/compare?run=runs/a").text
    assert "at least two" in client.get("/compare?run=runs/a").text


def test_a_run_is_readable_without_scripts(client: TestClient, tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    text = client.get("/run?run=runs/a").text
    for part in (
        "<polyline",
        "loss, nats / token: training from 1 to 0.25",
        '<th scope="row">4</th>',
        "config.yaml",
        "Resume",
    ):
        assert part in text, part
    listed = client.get("/").text
    assert 'href="/run?run=runs%2Fa"' in listed
    assert "failed" in listed


def test_a_strangers_status_stops_no_process(client: TestClient, tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    status = {"status": "running", "pid": 1, "host": "x", "locked": False, "started": ""}
    (run / "status.json").write_text(json.dumps(status), "utf-8")
    assert "is not running on this machine" in client.post("/stop", data={"run": "runs/a"}).text


def test_what_cannot_start_is_said(client: TestClient, tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    fill(tmp_path)
    for text, why in (("", "exists; resume it"), ("tune.rnak=3", "did you mean"), ("hello", "expected KEY=VALUE")):
        reply = client.post("/start", data={"recipe": "recipe.yaml", "set": text})
        assert (reply.status_code, why in reply.text) == (400, True), text
    assert client.post("/start", data={"recipe": "nothing.yaml"}).status_code == 400


def test_a_file_of_rows_without_a_recipe(client: TestClient, tmp_path: Path) -> None:
    fill(tmp_path)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("not json\n")
    text = client.get("/data?file=rows.jsonl").text
    for part in ("data.format=messages", "rows.jsonl:13", "rows.jsonl:1<", 'class="bar"', "characters"):
        assert part in text, part


def test_histogram_and_charts() -> None:
    assert bins([]) == []
    assert bins([3, 3, 5]) == [Bin(3, 3, 2), Bin(4, 4, 0), Bin(5, 5, 1)]
    wide = bins(range(1000))
    assert sum(b.rows for b in wide) == 1000
    assert wide[-1].high >= 999
    events = [{"event": "train", "step": n, "loss": 2.0, "lr": 0.0} for n in range(1, 2000)]
    events.append({"event": "train", "step": 1000, "loss": 9.0, "lr": "nan"})
    loss, rate = charts(panels(events), "sft")
    (line,) = loss.lines
    assert len(line.values) <= 310
    assert max(value for _, _, value in line.values) == 9.0  # a spike is not thinned away
    assert rate.lines[0].last == 0.0
    assert len(loss.rows) <= 101


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {taken} is in use"):
            open_port(taken)
        monkeypatch.setattr("mlxft.studio.app.PORT", taken)
        with open_port(None) as found:  # the next that is free
            assert taken < found.getsockname()[1] < taken + 20
            assert found.getsockname()[0] == "127.0.0.1"


def test_one_studio_in_a_folder(tmp_path: Path) -> None:
    work = Workplace(tmp_path)
    with work.held("http://127.0.0.1:1/?token=x"):
        assert (tmp_path / LOCK).stat().st_mode & 0o077 == 0
        with pytest.raises(ConfigError, match=r"already: http://127\.0\.0\.1:1/\?token=x"), work.held("second"):
            pass
    assert not (tmp_path / LOCK).exists()
    with work.held("third"):
        pass
