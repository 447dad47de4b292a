"""The page of a report in a real browser."""

import re

import pytest
from chromium import chromium
from conftest import char_tokenizer
from playwright.sync_api import expect
from sample_files import HOSTILE, rows, sample, write_samples

from lightning_grpo.record import read_run
from lightning_grpo.report.page import write

pytestmark = pytest.mark.browser
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def show(browser, tmp_path):
    """Open the page of the run that ``tmp_path`` contains; whatever the browser complains about fails the test."""
    complaints, contexts = [], []

    def show(address="", **context):
        if not (tmp_path / "report.html").exists():
            write([read_run(tmp_path)], tmp_path / "report.html")
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.extend([request.url] * (not request.url.startswith("file:"))))
        page.goto(f"file://{tmp_path}/report.html{address}")
        page.wait_for_selector("#samples[data-ready]")
        return page

    yield show
    for context in contexts:
        context.close()
    assert complaints == []


def fill(page, **filters):
    for name, value in filters.items():
        field = page.locator(f".sample-filters [name={name}]")
        if field.evaluate("field => field.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)


def assert_count(page, text):
    expect(page.locator(".sample-count")).to_have_text(text)


def first_row(page):
    return page.locator(".sample-row").first


def has_no_horizontal_scrolling(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_filters_leave_the_samples_that_match(show, tmp_path):
    write_samples(tmp_path, [*rows(10), sample(10, 2, 0, finish_reason="length", source="words")])
    page = show()
    for filters, matching in (
        ({"text": "ANSWER 3.1"}, 4),
        ({"text": "question 3"}, 8),
        ({"text": "no (such) [text"}, 0),
        ({"step_min": "2", "step_max": "3"}, 16),
        ({"reward_min": "0.5"}, 40),
        ({"advantage_max": "-0.1"}, 41),
        ({"finish": "length"}, 1),
        ({"source": "words"}, 1),
        ({"step_max": "3", "reward_min": "1", "text": "answer 2"}, 4),
    ):
        fill(page, **filters)
        some = f"{matching} sample{'s' * (matching > 1)} of 81"
        assert_count(page, some if matching else "No sample matches the filters.")
        page.click("button[type=reset]")
        assert_count(page, "81 samples of 81")


def test_the_list_is_sorted_and_has_a_row_per_prompt_on_request(show, tmp_path):
    write_samples(tmp_path, [sample(1, 0, i, reward=reward) for i, reward in enumerate([0.5, float("nan"), 2.0, -1.0])])
    page = show()
    for order, reward in (("-reward", "2"), ("step", "0.5"), ("reward", "−1")):
        fill(page, sort=order)
        expect(first_row(page).locator(":text('reward')").first).to_have_text(f"reward {reward}")
    expect(page.locator(".sample-row").last).to_contain_text("reward NaN")
    fill(page, per="group")
    assert_count(page, "1 prompt of 1")
    expect(first_row(page)).to_contain_text("question 1.0")


def test_the_completions_of_a_prompt_are_side_by_side(show, tmp_path):
    more = {"rewards/right": 1.0, "rewards/brief": 0.25, "extra/parsed": "42"}
    write_samples(tmp_path, [sample(4, 1, i, **more) for i in range(8)])
    page = show(viewport={"width": 1280, "height": 900})
    cards = page.locator(".sample-card")
    assert cards.count() == 8
    left, right = cards.nth(0).bounding_box(), cards.nth(1).bounding_box()
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert "question 4.1" in page.locator(".sample-prompt").inner_text()
    text = cards.nth(3).inner_text()
    for fact in ("answer 4.1.3", "reward 1", "advantage +0.5", "right", "brief", "0.25", "parsed", "42", "stop"):
        assert fact in text


def test_ten_thousand_samples_are_all_within_reach(show, tmp_path):
    write_samples(tmp_path, list(rows(1250)))
    page = show()
    assert_count(page, "10,000 samples of 10,000")
    assert page.locator(".sample-row").count() < 50
    page.locator(".sample-list").press("End")
    assert page.locator(".sample-row[aria-selected=true]").get_attribute("aria-posinset") == "10000"
    assert "answer 1250.1.3" in page.locator(".sample-card[aria-current=true]").inner_text()
    fill(page, text="answer 777.1.2")
    assert_count(page, "1 sample of 10,000")
    expect(first_row(page)).to_contain_text("answer 777.1.2")


def test_the_keyboard_reaches_every_sample(show, tmp_path):
    write_samples(tmp_path, list(rows(10)))
    page = show()
    lists = page.locator(".sample-list")
    for key, place in (("ArrowDown", 2), ("ArrowDown", 3), ("ArrowUp", 2), ("End", 80), ("Home", 1)):
        lists.press(key)
        row = page.locator(".sample-row[aria-selected=true]")
        assert row.get_attribute("aria-posinset") == str(place)
        assert lists.get_attribute("aria-activedescendant") == row.get_attribute("id")
    lists.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Completion 0"


def test_an_address_opens_its_sample(show, tmp_path):
    write_samples(tmp_path, list(rows(100)))
    page = show("#sample-90-1-2")
    selected, card = (
        page.locator(place) for place in (".sample-row[aria-selected=true]", ".sample-card[aria-current=true]")
    )
    expect(selected).to_contain_text("answer 90.1.2")
    expect(card).to_contain_text("answer 90.1.2")
    fill(page, text="question 3.")
    assert_count(page, "8 samples of 800")
    page.evaluate("location.hash = '#sample-5-0-1'")
    expect(selected).to_contain_text("answer 5.0.1")
    page.evaluate("location.hash = '#sample-500-0-1'")
    assert_count(page, "The sample of step 500, group 0, index 1 is not in this page.")
    page.locator(".sample-list").press("ArrowDown")
    assert page.url.endswith("#sample-5-0-2")


def test_filters_outlast_a_reload(show, tmp_path):
    write_samples(tmp_path, list(rows(10)))
    page = show()
    fill(page, step_min="9")
    assert_count(page, "16 samples of 80")
    page.reload()
    assert_count(page, "16 samples of 80")


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 900}, PHONE], ids=["desktop", "phone"])
def test_hostile_text_is_shown_and_never_runs(show, tmp_path, viewport):
    texts = list(HOSTILE.values())
    names = ("prompt", "completion", "source", "finish_reason", "extra/<b>")
    write_samples(tmp_path, [sample(1, i, 0, **dict.fromkeys(names, text)) for i, text in enumerate(texts)])
    page = show(viewport=viewport)
    for text in texts:
        body = page.locator(".sample-body")
        if len(text) > 4000:
            body.locator(".sample-more").click()
        visible = re.sub(r"[^\t\n\x20-\x7e]", lambda match: f"U+{ord(match[0]):04X}", text)
        assert body.inner_text() == visible
        assert has_no_horizontal_scrolling(page)
        right = (
            "Math.max(...[...document.querySelectorAll('.sample-card *')].map(e => e.getBoundingClientRect().right))"
        )
        assert page.evaluate(right) <= viewport["width"]
        page.locator(".sample-list").press("ArrowDown")
    assert page.evaluate("window.ran") is None
    assert page.locator("#samples :is(img, .sample-body a, .sample-prompt a, .sample-body script)").count() == 0


def test_what_the_policy_did_not_sample_is_grey(show, tmp_path):
    dialogue = {"completion": "hi🙂<ok>bye", "part_lengths": [3, 4, 3], "sampled": [True, False, True]}
    logged = {"engine_logprobs": [-0.1, None, -0.1]}
    write_samples(tmp_path, [sample(1, 0, 0, **dialogue, **logged)])
    page = show()
    body = page.locator(".sample-body")
    assert body.inner_text() == "hi🙂<ok>bye"
    assert body.locator(".sample-context").all_inner_texts() == ["<ok>"]
    colors = [part.evaluate("part => getComputedStyle(part).color") for part in body.locator("span").all()]
    assert colors[0] == colors[2] != colors[1]
    assert "2 tokens" in first_row(page).inner_text()
    page.locator(".sample-colors select").select_option("engine")
    assert page.locator(".sample-token.sample-context").all_inner_texts() == ["⟨2⟩"]
    assert "not sampled" in page.locator(".sample-token.sample-context").get_attribute("title")


def test_tokens_are_marked_by_log_prob_and_ratio(show, tmp_path):
    char_tokenizer().save_pretrained(tmp_path / "model")
    ids = char_tokenizer()("a b")["input_ids"]
    logged = {"engine_logprobs": [-0.01, -1.0, -6.0], "trainer_logprobs": [-0.01, -1.5, -5.0]}
    write_samples(tmp_path, [sample(1, 0, 0, completion_ids=ids, completion="a b", **logged)])
    (tmp_path / "run.json").write_text(f'{{"model": "{tmp_path / "model"}"}}')
    page = show()
    tokens = page.locator(".sample-body .sample-token")
    levels = lambda: [re.search(r"level-(\d)", tokens.nth(i).get_attribute("class"))[1] for i in range(tokens.count())]
    fill_colors = page.locator(".sample-colors select")
    fill_colors.select_option("engine")
    assert tokens.all_inner_texts() == ["a", " ", "b"]
    assert levels() == ["0", "2", "4"]
    fill_colors.select_option("ratio")
    assert levels() == ["0", "4", "4"]
    assert "sample-below" in tokens.nth(1).get_attribute("class")
    assert "sample-below" not in tokens.nth(2).get_attribute("class")
    body = page.locator(".sample-body")
    body.press("ArrowRight")
    body.press("ArrowRight")
    status = page.locator(".sample-status").inner_text()
    assert "token 2" in status and "engine −1.000, trainer −1.500, ratio 0.607" in status
    assert tokens.nth(1).get_attribute("title") in status


def test_the_page_follows_the_color_scheme(show, tmp_path):
    write_samples(tmp_path, list(rows(2)))
    background = "getComputedStyle(document.querySelector('.sample-card')).backgroundColor"
    colors = {scheme: show(color_scheme=scheme).evaluate(background) for scheme in ("light", "dark")}
    assert colors["light"] != colors["dark"]


def test_a_phone_shows_all_without_horizontal_scrolling(show, tmp_path):
    more = {"rewards/right": 1.0, "rewards/a_reward_with_a_very_long_name_indeed": 0.25, "extra/parsed": "4" * 500}
    write_samples(tmp_path, [sample(4, 1, i, **more) for i in range(8)])
    page = show(viewport=PHONE)
    assert has_no_horizontal_scrolling(page)
    assert page.locator(".sample-card").first.bounding_box()["width"] > 300


def test_damaged_logs_give_a_page_with_warnings(show, tmp_path):
    write_samples(tmp_path, list(rows(3)))
    write_samples(tmp_path, list(rows(3)), number=1).write_bytes(b"PAR1 half-written")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "findings.jsonl").write_text('{"step": 1, "samples": 3}\n\0\0')
    page = show()
    warnings = " ".join(page.locator(".warning").all_inner_texts())
    for name in ("run.json", "metrics.jsonl", "rank0-000001.parquet"):
        assert name in warnings
    assert_count(page, "24 samples of 24")
