"""The charts of a report in a real browser."""

import json

import pytest
from chromium import chromium
from playwright.sync_api import expect
from run_folders import FINDING, write_run

from lightning_grpo.record import read_run
from lightning_grpo.report.page import write

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def show(browser, tmp_path):
    """Open the report of a run with a finding, or of several runs; a complaint of the browser fails the test."""
    complaints, contexts = [], []

    def show(runs=1, reload_seconds=None, **context):
        folders = [write_run(tmp_path / f"run{i}", seed=i, gain=0.5 + 0.1 * i) for i in range(runs)]
        (folders[0] / "findings.jsonl").write_text(json.dumps(FINDING) + "\n")
        write([read_run(folder) for folder in folders], tmp_path / "x.html", reload_seconds=reload_seconds)
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"file://{tmp_path / 'x.html'}")
        return page

    yield show
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_charts_are_drawn_in_the_colors_of_the_theme(show, theme):
    page = show(color_scheme=theme)
    chart = page.locator("#metrics figure.chart").first
    chart.scroll_into_view_if_needed()
    expect(chart.locator("svg.main-svg").first).to_be_visible()
    drawn = chart.locator(".scatterlayer path.js-line").last.evaluate("line => getComputedStyle(line).stroke")
    assert drawn == {"light": "rgb(42, 98, 216)", "dark": "rgb(126, 166, 255)"}[theme]
    page.emulate_media(color_scheme="dark" if theme == "light" else "light")
    line = chart.locator(".scatterlayer path.js-line").last
    expect(line).not_to_have_css("stroke", drawn)


def test_a_chart_is_drawn_when_it_is_opened(show):
    page = show()
    evidence = page.locator("article.finding figure.chart")
    expect(evidence.locator("svg")).to_have_count(0)
    page.locator("article.finding summary").click()
    expect(evidence.locator("svg.main-svg").first).to_be_visible()


@pytest.mark.parametrize("runs", [1, 4])
def test_nothing_is_wider_than_a_phone(show, runs):
    page = show(runs, viewport={"width": 390, "height": 844})
    charts = page.locator("section > figure.chart, .grid > figure.chart")
    for i in range(charts.count()):
        if charts.nth(i).is_visible():
            charts.nth(i).scroll_into_view_if_needed()
            expect(charts.nth(i).locator("svg.main-svg").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_live_page_is_reloaded_with_what_was_open(show):
    page = show(reload_seconds=1.0)
    page.locator("#metrics summary").first.click()
    with page.expect_event("load", timeout=5000):
        pass
    expect(page.locator("#metrics details").first).to_have_attribute("open", "")
