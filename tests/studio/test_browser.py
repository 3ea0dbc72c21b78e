"""The studio in a browser: every page at two widths, light and dark; a run started, watched, stopped and resumed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import EVIL, Served, fill, serve

import mlxft

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_core: Any = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed")

BROWSERS = (
    *("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
LONG = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, make_model_dir: Callable[..., Path]) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("studio")
    make_model_dir(folder / "tiny")
    fill(folder)
    paths = [f"model.path={folder / 'tiny'}", f"data.train={folder / 'rows.jsonl'}", f"run.dir={folder / 'runs'}"]
    for name in ("done", "short"):
        mlxft.train(folder / "recipe.yaml", *paths, f"run.name={name}")
    served = serve(folder, "--port", "0")
    yield served
    assert served.end() == (0, "studio closed\n")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium or Chrome is installed (Debian: apt-get install chromium-headless-shell)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


def opened(browser: Any, served: Served, **options: Any) -> tuple[Any, list[str]]:
    """A page of a browser that is logged in, and the list of its console errors."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(LONG)
    wrong: list[str] = []
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(served.address)
    return page, wrong


def open_labels(served: Served, name: str) -> str:
    """Open a file of judgements, and return its name."""
    assert served.ask("/label/open", prompts="ab.jsonl", out=f"{name}.jsonl")[0] == 303
    return f"{name}.jsonl"


def press(page: Any, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def drawn(page: Any) -> list[list[float]]:
    """[x, step, value] of the first curve's points."""
    lines = page.evaluate("[...document.querySelectorAll('polyline')].map((line) => line.dataset.values)")
    return json.loads(lines[0]) if lines else [[0, 0, 0]]


def text_of(page: Any, selector: str) -> str:
    return str(page.locator(selector).first.text_content()).strip()


def test_a_run_is_started_watched_stopped_and_resumed(browser: Any, served: Served) -> None:
    page, wrong = opened(browser, served)
    page.select_option("#recipe", "recipe.yaml")
    page.fill("#set", "run.steps=100000\nrun.name=long\nrun.save_every=100000")
    press(page, "Start")
    page.locator(".badge", has_text=re.compile("^running$")).wait_for()
    page.locator("polyline").first.wait_for()
    before = len(drawn(page))
    page.locator("details >> nth=0").click()
    for _ in range(100):  # the curve grows without a reload, and an open table stays open
        page.wait_for_timeout(200)
        if len(drawn(page)) > before:
            break
    assert len(drawn(page)) > before
    assert page.locator(".plot details").first.get_attribute("open") is not None
    press(page, "Stop")
    page.locator(".badge.interrupted").wait_for()
    reached = drawn(page)[-1][1]
    press(page, "Resume")
    page.locator(".badge", has_text=re.compile("^running$")).wait_for()
    for _ in range(100):
        page.wait_for_timeout(200)
        values = json.loads(
            page.evaluate("(document.querySelector('polyline') ?? {dataset: {values: '[[0,0,0]]'}}).dataset.values")
        )
        if values[-1][1] > reached:
            break
    assert values[-1][1] > reached
    assert values[0][1] == 1  # the steps before are still there
    press(page, "Stop")
    page.locator(".badge.interrupted").wait_for()
    assert wrong == []


def test_the_list_of_runs_follows_them_and_leaves_focus_and_fields_alone(browser: Any, served: Served) -> None:
    page, wrong = opened(browser, served)
    page.fill("#set", "run.name=mine")
    box = page.get_by_label("Compare runs/done")
    box.check()
    page.evaluate("document.querySelector('#set').mark = 1")
    link = page.get_by_role("link", name="runs/short")
    link.focus()
    assert served.ask("/start", recipe="recipe.yaml", set="run.name=listed\nrun.steps=100000")[0] == 303
    row = page.locator("tr", has=page.get_by_role("link", name="runs/listed"))
    row.locator(".badge.running").wait_for()  # without a reload
    assert page.evaluate("document.activeElement.textContent") == "runs/short"
    box.focus()
    step = row.locator("[data-part$=step]")
    sync_api.expect(step).not_to_have_text(str(step.text_content()), timeout=LONG)
    assert served.ask("/stop", run="runs/listed")[0] == 303
    row.locator(".badge.interrupted").wait_for()
    assert box.is_checked()
    assert page.evaluate("document.activeElement.value") == "runs/done"
    assert page.input_value("#set") == "run.name=mine"
    assert page.evaluate("document.querySelector('#set').mark") == 1
    assert wrong == []


def test_base_and_run_are_compared_as_they_write(browser: Any, served: Served) -> None:
    page, wrong = opened(browser, served)
    page.goto(f"{served.base}/playground?run=runs/short")
    page.fill("#prompt", EVIL)
    page.click("summary:has-text('Options')")
    page.fill("#max_tokens", "5")
    page.click("button.main")
    page.locator(".busy", has_text="Done.").wait_for()
    assert page.locator("#completions h2").all_text_contents() == ["base", "runs/short"]
    assert all(page.locator("#completions .text").all_text_contents())
    page.fill("#max_tokens", "100000")  # and stopped
    page.click("button.main")
    page.locator("#completions .text:not(:empty)").first.wait_for()
    page.click("#stop")
    page.locator("#completions p", has_text="stopped").first.wait_for()
    assert wrong == []


def test_judging_by_keys(browser: Any, served: Served) -> None:
    page, wrong = opened(browser, served)
    page.goto(f"{served.base}/label")
    page.select_option("#prompts", "ab.jsonl")
    page.fill("#out", "keys.jsonl")
    page.click("button.main")
    for number, key in enumerate("120us", 1):
        page.locator("#label").wait_for()
        page.keyboard.press(key)
        said = {1: "1 of 30 judged", 2: "2 of 30", 3: "3 of 30", 4: "2 of 30", 5: "2 of 30 judged, 1 skipped"}[number]
        page.locator("p[role=status]", has_text=said).wait_for()
    assert wrong == []
    assert page.title() == "Label - mlxft studio"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_read_aloud_and_make_no_errors(browser: Any, served: Served, scheme: str) -> None:
    page, wrong = opened(browser, served, color_scheme=scheme)
    axe = axe_core.Axe()
    run = "run=runs/done"
    paths = [
        "/",
        f"/run?{run}",
        f"/run/report?{run}",
        f"/compare?{run}&run=runs/short",
        "/data?recipe=recipe.yaml",
        "/data?file=ab.jsonl",
    ]
    for path in [*paths, "/playground", "/label", f"/label?out={open_labels(served, scheme)}"]:
        page.goto(f"{served.base}{path}")
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert over <= 0, (path, width)
        found = axe.run(page, options={"resultTypes": ["violations"]})
        serious = [
            (v["id"], [n["html"] for n in v["nodes"]][:3])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert serious == [], path
    assert wrong == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(250, 250, 250)" if scheme == "light" else "rgb(20, 22, 26)"
    )
    page.goto(f"{served.base}/")
    page.click("#theme")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if scheme == "light" else "light")


def test_pages_are_readable_without_javascript(browser: Any, served: Served) -> None:
    page, _ = opened(browser, served, java_script_enabled=False)
    assert page.get_by_role("link", name="runs/done").is_visible()
    page.goto(f"{served.base}/run?run=runs/done")
    assert page.locator("polyline").count() > 0
    page.click("summary:has-text('Numbers') >> nth=0")
    assert page.locator(".plot td").first.is_visible()
    page.goto(f"{served.base}/playground?run=runs/short")
    page.fill("#prompt", "the in")
    page.click("summary:has-text('Options')")
    page.fill("#max_tokens", "5")
    page.click("button.main")
    assert page.locator("#completions h2").all_text_contents() == ["base", "runs/short"]
    page.goto(f"{served.base}/label?out={open_labels(served, 'plain')}")
    page.click("button[value='1']")
    assert "1 of 30 judged" in text_of(page, "p[role=status]")
