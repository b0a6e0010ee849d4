"""The page in a headless Chromium.

Search to reasons, a new entity, the keyboard alone, mistakes, 320 pixels, markup.
"""

from __future__ import annotations

import io
import shutil
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("playwright", reason="Playwright is not installed")

from service_client import MARKUP, Server, with_markup

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no headless browser: Debian's package chromium"),
]
WAIT_MS = 30_000
SHOWN = {"": ".cards", "entity": ".facts", "ask": ".ranked", "new": ".panel", "run": ".run"}
OPTION = "#found [role=option]"


@pytest.fixture(scope="module")
def server(bundle_dir: Path, answered_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    marked = with_markup(bundle_dir, tmp_path_factory.mktemp("shown") / "marked")
    places = (f"items={bundle_dir}", str(marked))
    running = Server(*places, "--data", str(answered_run.parent / "dataset"), "--trust-encoders")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """A page that opens `address`; what it complains about fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None
    )
    foreign: list[str] = []
    opened.on(
        "request",
        lambda request: (
            foreign.append(request.url)
            if f":{server.port}/" not in request.url and not request.url.startswith("blob:")
            else None
        ),
    )
    opened.address = f"http://127.0.0.1:{server.port}/"
    yield opened
    context.close()
    assert complaints == [] and foreign == []


def go(page: Any, *parts: str, query: str = "") -> None:
    path = "/".join(urllib.parse.quote(part, safe="") for part in parts)
    page.goto(f"{page.address}#/{path}{query}")


def test_search_leads_to_an_entity_a_relation_answers_and_reasons(page, server):
    page.goto(page.address)
    page.get_by_role("combobox", name="Search entities").fill("item 1")
    page.locator(OPTION).first.wait_for()
    page.locator(OPTION, has_text="item 17").click()
    page.get_by_role("heading", level=1, name="item 17").wait_for()
    assert "/items/entity/item%2017" in page.url
    page.locator(".chip", has_text="near ?").first.click()
    page.locator(".ranked .answer").nth(9).wait_for()
    expected = server.get("/predict", head="item 17", relation="near", top=10, filter="none").json["answers"]
    assert [text.split("\n")[0] for text in page.locator(".ranked .name").all_inner_texts()] == [
        answer["label"] for answer in expected
    ]
    known = [bool(answer["known"]) for answer in expected]
    assert page.locator(".ranked .answer .mark").count() == sum(known)
    page.get_by_role("button", name="Why").first.click()
    page.locator(".why:not([hidden]) h3").first.wait_for()
    assert f"why={expected[0]['id'].replace(' ', '+')}" in page.url
    shared = page.url
    page.goto("about:blank")
    page.goto(shared)
    page.locator(".why:not([hidden]) h3").first.wait_for()
    page.get_by_label("Only what is new").check()
    page.wait_for_url("**known=hide**")
    page.wait_for_function(
        "document.querySelectorAll('.ranked .answer .mark').length === 0 && document.querySelector('.ranked')"
    )


def test_an_animated_picture_can_be_paused(page, server):
    entities = (server.get(f"/entity/item%20{number:02d}").json for number in range(60))
    about = next(one for one in entities if one["media"])

    def moving(route: Any) -> None:
        reply = route.fetch()
        media = [{**about["media"][0], "modality": "video", "type": "image/webp"}]
        route.fulfill(response=reply, json={**reply.json(), "media": media})

    page.route("**/entity/item*", moving)
    go(page, "items", "entity", about["id"])
    page.locator(".film img").wait_for()
    page.get_by_role("button", name="Pause").click()
    page.locator(".film canvas").wait_for()
    assert page.locator(".film img").is_hidden() and page.locator(".film canvas").get_attribute("width") != "300"
    page.get_by_role("button", name="Play").click()
    page.locator(".film img").wait_for()


def test_the_keyboard_alone_is_enough(page):
    page.goto(page.address)
    page.locator(".cards a").first.wait_for()
    page.keyboard.press("/")
    page.keyboard.type("item 1")
    page.locator(OPTION).first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    chosen = page.locator(f"{OPTION}[aria-selected=true]").inner_text().split("\n")[0]
    page.keyboard.press("Enter")
    page.get_by_role("heading", level=1, name=chosen).wait_for()

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reached by the tabulator")

    tab_to(".chip")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Enter")
    page.locator(".ranked .answer").first.wait_for()
    tab_to(".ask-why")
    page.keyboard.press("Enter")
    page.locator(".why:not([hidden]) h3").first.wait_for()
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"


def test_a_new_entity_is_placed_and_asked_about(page, server, tmp_path):
    out = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 40, 40)).save(out, "PNG")
    (tmp_path / "red.png").write_bytes(out.getvalue())
    go(page, "items", "new")
    page.get_by_label("Name").fill("Something new")
    page.get_by_label("Description").fill("a longer text")
    page.get_by_label("Size").fill("1.5")
    page.get_by_label("Picture").set_input_files(str(tmp_path / "red.png"))
    page.locator(".preview img").wait_for()
    page.get_by_role("button", name="Place it").click()
    page.get_by_role("heading", name="Nearest to it").wait_for()
    assert page.locator("#placed .strip li").count() > 3 and page.locator("#placed .made .row").count() == 3
    page.locator("#placed .chip").first.click()
    page.locator("#placed .ranked .answer").nth(9).wait_for()
    assert "relation=" in page.url and "n.size=1.5" in page.url
    assert page.get_by_label("Name").input_value() == "Something new"


def test_empty_and_wrong_input_is_told(page):
    go(page, "items", "new")
    page.get_by_role("button", name="Place it").click()
    page.get_by_text("nothing is given that this model knows").wait_for()
    page.get_by_label("Size").fill("1,5")
    page.get_by_role("button", name="Place it").click()
    page.get_by_text("is no number").wait_for()
    assert page.evaluate("document.activeElement.name") == "n.size"
    field = page.get_by_role("combobox", name="Search entities")
    field.fill("qqqqqqq")
    page.get_by_text("No entity has a name like this.").wait_for()
    field.press("Enter")
    field.fill("")
    field.press("Enter")
    page.locator("#found").wait_for(state="hidden")
    for parts in (
        ("items", "entity", "nobody"),
        ("items", "nothing"),
        ("no such graph",),
        ("items", "ask", "item 05", "no such relation", "tail"),
    ):
        go(page, *parts)
        page.get_by_role("heading", name="Not found").wait_for()
        assert page.get_by_role("alert").inner_text()
        go(page, "items")
        page.locator(".cards").wait_for()


def test_a_name_with_markup_is_shown_as_text(page):
    go(page, "marked", "entity", MARKUP)
    page.locator("h1").wait_for()
    assert page.locator("h1").inner_text() == MARKUP
    assert page.title().startswith(MARKUP) and page.locator("main img[src='x']").count() == 0
    page.get_by_role("combobox", name="Search entities").fill("<img")
    page.locator(OPTION).first.wait_for()
    assert MARKUP in page.locator(OPTION).first.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_into_320_pixels(browser, server, scheme):
    context = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.address = f"http://127.0.0.1:{server.port}/"
    views = [(), ("entity", "item 17"), ("ask", "item 17", "near", "tail"), ("new",), ("run",)]
    for view in views:
        go(page, "items", *view)
        page.locator(SHOWN[view[0] if view else ""]).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 320, view
        ink, paper = page.evaluate(
            "[getComputedStyle(document.querySelector('h1')).color,"
            " getComputedStyle(document.documentElement).backgroundColor]"
        )
        assert (brightness(ink) > brightness(paper)) == (scheme == "dark")
        assert abs(brightness(ink) - brightness(paper)) > 150
    page.goto(f"{page.address}docs")
    page.locator(".route").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    context.close()


def brightness(colour: str) -> float:
    numbers = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(numbers) / 3


def test_every_field_button_and_link_has_a_name(page):
    for view in ((), ("entity", "item 17"), ("ask", "item 17", "near", "tail"), ("new",), ("run",)):
        go(page, "items", *view)
        page.locator(SHOWN[view[0] if view else ""]).first.wait_for()
        page.wait_for_load_state("networkidle")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('a, button, input, select, textarea')].filter(e =>
                !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !(e.labels && e.labels.length)
                && ![...e.querySelectorAll('img')].some(picture => picture.alt.trim())
            ).map(e => e.outerHTML)"""
        )
        assert nameless == []
        assert page.locator("h1").count() == 1 and page.locator("html[lang]").count() == 1
