"""A studio's pages in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra studio is not installed")

from starlette.testclient import TestClient

from mlxft.studio.app import Studio
from mlxft.studio.work import Workplace


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Studio:
    """A studio in an empty folder, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    return Studio(Workplace(tmp_path))


@pytest.fixture
def client(studio: Studio) -> Iterator[TestClient]:
    """A browser that has opened the address with the token."""
    with TestClient(studio.app("secret", "c"), base_url="http://127.0.0.1:1", follow_redirects=False) as client:
        assert client.get("/?token=secret").status_code == 303
        client.headers["origin"] = "http://127.0.0.1:1"
        yield client
    studio.desk.close()
    studio.play.close()
