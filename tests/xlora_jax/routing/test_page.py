"""The page of a report in headless Chromium, with a model whose experts and texts have hostile names."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from tests.helpers.browser import keep_screenshot, open_browser, show
from tests.helpers.synthetic import synthetic
from xlora_jax import Codec, Rows, XLoraModel, report_routing
from xlora_jax.routing.page import render_page

DOCS_PAGE = Path(__file__).parents[3] / "docs" / "pictures" / "quickstart-report.html"

# Token ids are printable characters, so that any text can be written with them.
CODEC = Codec(
    encode=lambda text, start: ([ord(character) - 31 for character in text], start),
    decode=lambda ids: "".join(chr(i + 31) for i in ids),
)
PROMPT = '<script>window.hacked = 1</script> & "x"'
EXPERTS = ('"><img src=x onerror=window.hacked=1>', "law & order", "<b>math</b>")
TEXTS = ("</script><script>window.hacked=1</script>", "plain")


@pytest.fixture(scope="module")
def report():
    model, params = synthetic(layerwise_scalings=True)
    model = XLoraModel(model.module, params, model.config, model.layers, EXPERTS)
    random = np.random.default_rng(0)
    rows = {name: Rows.from_tokens(random.integers(1, 95, (3, 24))) for name in TEXTS}
    learned = rows["plain"].arrays["input_ids"].copy()
    learned[:, :9] = -100
    rows["plain"] = Rows.from_tokens(rows["plain"].arrays["input_ids"], learned)
    training = [
        {"step": step, "kind": "train", "loss": 3 - step / 10, **{f"gate/{name}": 1 / 3 for name in EXPERTS}}
        for step in range(1, 9)
    ] + [{"step": 8, "kind": "eval", "held_loss": 2.5}]
    samples = [model.routing(PROMPT, codec=CODEC, max_new_tokens=8)]
    return report_routing(
        model,
        rows,
        codec=CODEC,
        effects=True,
        batch_size=2,
        samples=samples,
        training=training,
        title="<i>Title</i>",
    )


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    return report.write(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser():
    driver = open_browser()
    yield driver
    driver.quit()


def tokens_of(browser):
    return browser.find_elements(By.CSS_SELECTOR, ".t")


def tip_of(browser):
    return browser.find_element(By.ID, "tip")


def test_files_of_a_report(report, page):
    plots = {
        f"{plot}.{kind}"
        for plot in ("gates", "usage", "entropy", "losses", "co_use", "training")
        for kind in ("png", "svg")
    }
    assert {path.name for path in page.parent.iterdir()} == plots | {"report.html", "report.json"}
    for name in plots:
        content = (page.parent / name).read_bytes()
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    stored = json.loads((page.parent / "report.json").read_text())
    assert stored == report.content
    assert stored["schema"] == "xlora-jax routing report 1"
    # The whole is the mean of the texts, weighted by their tokens.
    texts = stored["texts"].values()
    tokens = [entry["tokens"] for entry in texts]
    assert stored["all"]["tokens"] == sum(tokens)
    for name in ("loss", "mean_gates", "entropy", "change"):
        weights = tokens if name != "change" else [count - rows for count, rows in zip(tokens, (3, 3), strict=True)]
        mean = np.average([entry[name] for entry in texts], axis=0, weights=weights)
        np.testing.assert_allclose(stored["all"][name], mean, atol=2e-5)
    assert [sample["name"] for sample in stored["samples"]] == [PROMPT[:40], *TEXTS]
    assert "".join(stored["samples"][0]["tokens"]).startswith(PROMPT)
    assert [part["kind"] for part in stored["samples"][0]["parts"]] == ["prompt", "generated"]
    assert stored["samples"][2]["parts"] == [{"start": 0, "kind": "prompt"}, {"start": 9, "kind": "answer"}]
    assert str(page.parent) not in page.read_text()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_the_page_works_in_both_themes_and_widths(browser, page, width, dark):
    show(browser, page, width=width, dark=dark)
    assert browser.execute_script("return document.documentElement.dataset.ready") == "true"
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    # What data holds is text: no element and no script came of it.
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_elements(By.CSS_SELECTOR, "img, b > script, i") == []
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.find_element(By.TAG_NAME, "h1").text == "<i>Title</i>"
    assert browser.title == "<i>Title</i>"
    legend = [item.text for item in browser.find_elements(By.CSS_SELECTOR, ".bar .legend li")]
    assert legend == list(EXPERTS)
    # Nothing is wider than the screen.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in background[4:-1].split(",")) < 200) == dark
    path = keep_screenshot(browser, f"page-{'phone' if width < 600 else 'wide'}-{'dark' if dark else 'light'}")
    assert path.stat().st_size > 20_000


def test_tokens_show_their_weights_to_mouse_and_keyboard(browser, page, report):
    show(browser, page)
    tokens, sample = tokens_of(browser), report.samples[0]
    assert "".join(token.get_property("textContent") for token in tokens) == "".join(sample.tokens)
    assert [part.text for part in browser.find_elements(By.CSS_SELECTOR, ".part")] == ["prompt", "generated"]
    assert len(browser.find_elements(By.CSS_SELECTOR, ".t.new")) == 8
    assert not tip_of(browser).is_displayed()
    ActionChains(browser).scroll_to_element(tokens[5]).move_to_element(tokens[5]).perform()
    shown = tip_of(browser).text
    assert tip_of(browser).is_displayed()
    mean = sample.shares[5].mean(axis=0)
    names = [line for line in shown.splitlines() if line in EXPERTS]
    assert names == [EXPERTS[e] for e in np.argsort(-mean)]
    assert f"{mean.max():.0%}" in shown
    browser.execute_script("document.querySelector('.t').focus()")
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    active = browser.switch_to.active_element
    assert active.get_attribute("data-token") == "2"
    assert all(name in active.get_attribute("aria-label") for name in EXPERTS)
    assert "token 3, prompt" in tip_of(browser).text
    ActionChains(browser).send_keys(Keys.END).perform()
    assert "generated" in tip_of(browser).text
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not tip_of(browser).is_displayed()
    assert browser.get_log("browser") == []


def test_layers_texts_and_search(browser, page, report):
    show(browser, page)
    sample = report.samples[0]

    def leaders():
        return [int(token.get_attribute("data-expert")) for token in tokens_of(browser)]

    assert leaders() == sample.leaders.tolist()
    select = Select(browser.find_element(By.ID, "layer"))
    assert len(select.options) == 1 + len(sample.layer_names)
    for layer in (0, len(sample.layer_names) - 1):
        select.select_by_value(str(layer))
        # Shares are embedded as bytes, so two that are as good as equal may swap.
        shares = np.round(sample.shares[:, layer] * 255)
        assert leaders() == shares.argmax(-1).tolist()
    select.select_by_value(str(len(sample.layer_names)))
    search = browser.find_element(By.ID, "search")
    search.send_keys("SCRIPT>")
    whole = "".join(sample.tokens).lower()
    assert browser.find_element(By.CSS_SELECTOR, ".count").text == f"{whole.count('script>')} matches"
    hits = browser.find_elements(By.CSS_SELECTOR, ".t.hit")
    assert "".join(hit.get_property("textContent") for hit in hits) == "script>" * whole.count("script>")
    search.clear()
    buttons = browser.find_elements(By.CSS_SELECTOR, "[aria-label=Text] button")
    buttons[2].click()
    assert [part.text for part in browser.find_elements(By.CSS_SELECTOR, ".part")] == ["prompt", "answer"]
    assert len(tokens_of(browser)) == len(report.samples[2].tokens)
    measures = browser.find_elements(By.CSS_SELECTOR, "[aria-label=Measure] button")
    before = browser.find_element(By.CSS_SELECTOR, ".stack").get_attribute("aria-label")
    measures[1].click()
    assert browser.find_element(By.CSS_SELECTOR, ".stack").get_attribute("aria-label") != before
    theme = browser.find_element(By.ID, "theme")
    theme.click()
    theme.click()
    assert browser.execute_script("return document.documentElement.dataset.theme") == "dark"
    browser.execute_script("localStorage.clear()")
    assert browser.get_log("browser") == []


def test_a_text_alone_is_a_page_too(browser, report, tmp_path):
    path = tmp_path / "frame.html"
    path.write_text(f"<!DOCTYPE html><title>notebook</title>{report.samples[0]._repr_html_()}", encoding="utf-8")
    show(browser, path)
    browser.switch_to.frame(0)
    assert len(tokens_of(browser)) == len(report.samples[0].tokens)
    ActionChains(browser).move_to_element(tokens_of(browser)[3]).perform()
    assert tip_of(browser).is_displayed()
    browser.switch_to.default_content()
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_extra(report, missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}, which is missing: pip install 'xlora-jax\[plots\]'"):
        report.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_in_the_docs_is_up_to_date_and_works(browser):
    """If not: `make demo`, and copy examples/output/quickstart/report/report.html to DOCS_PAGE."""
    text = DOCS_PAGE.read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert render_page(data["report"], data["samples"]) == text
    show(browser, DOCS_PAGE)
    assert browser.get_log("browser") == []
    assert len(tokens_of(browser)) == len(data["samples"][0]["tokens"])
