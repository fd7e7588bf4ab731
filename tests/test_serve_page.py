"""The page in headless Chromium: prompts are answered, weights are bars, uploads and deletions work, names are text."""

import os
import shutil

import pytest
from serve_fake import FakeEngine
from serve_server import adapter_files, adapter_parts, serving, wait_until

pytest.importorskip("selenium", reason="needs the package selenium, in the extra test")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

EVIL = """<img src=x onerror="document.title='run'"><svg onload="document.title='run'">"""
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in found.items() if path is None]:
        # where a skip would hide that the page was never opened
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {missing[0]}: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(found["chromedriver"]))
    driver.set_window_size(1200, 900)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store"), FakeEngine(0.01)) as server:
        assert server.upload(adapter_parts("poet", ["rhyme verse"]))[0] == 201
        assert server.upload(adapter_parts(EVIL, ["verse ode"]))[0] == 201
        yield server


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def text(browser, selector):
    return find(browser, selector).get_attribute("textContent")


def names(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#adapters .name')].map(n => n.firstChild.data)"
    )


def opened(browser, server):
    # a page of an earlier test may have asked a server that was gone
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(server.url)
    wait_until(lambda: names(browser) == server.names())


def no_errors(browser):
    assert [line["message"] for line in browser.get_log("browser")] == []


def test_a_prompt_is_answered(browser, server):
    opened(browser, server)
    find(browser, "#prompt").send_keys("a rhyme in the verse")
    find(browser, "#send").click()
    wait_until(lambda: text(browser, "#told").startswith("7 tokens in"))
    assert text(browser, "#answer") == f"poet+{EVIL} user: a rhyme in the verse"
    bars = browser.find_elements(By.CSS_SELECTOR, "#bars li")
    assert [bar.text.splitlines() for bar in bars] == [["poet", "50 %"], [EVIL, "50 %"]]
    for bar in bars:
        width = bar.find_element(By.TAG_NAME, "i").size["width"]
        assert width == pytest.approx(bar.size["width"] / 2, abs=2)
    wait_until(lambda: text(browser, "#count") == "2")
    no_errors(browser)


def test_text_comes_while_it_is_made(browser, server):
    opened(browser, server)
    find(browser, "#prompt").send_keys("slow")
    Select(find(browser, "#model")).select_by_value("base")
    find(browser, "#send").click()
    wait_until(lambda: text(browser, "#answer").startswith("wait wait"))
    assert text(browser, "#told") == "" and find(browser, "#send").get_property("disabled")
    wait_until(lambda: text(browser, "#running") == "1" and float(text(browser, "#rate")) > 0)
    wait_until(lambda: text(browser, "#told").startswith("64 tokens"))
    assert browser.find_elements(By.CSS_SELECTOR, "#bars li") == []
    no_errors(browser)


def test_names_are_text(browser, server):
    opened(browser, server)
    assert EVIL in names(browser)
    assert EVIL in [option.text for option in Select(find(browser, "#model")).options]
    assert browser.title == "lorakern" and browser.find_elements(By.CSS_SELECTOR, "img, svg") == []
    policy = browser.execute_script("return fetch('/').then(r => r.headers.get('content-security-policy'))")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    no_errors(browser)


def put(browser, folder, name, files, texts=""):
    for field, file, content in zip(("config", "weights"), ("c.json", "w.safetensors"), files, strict=True):
        (folder / file).write_bytes(content)
        find(browser, f"#{field}").send_keys(str(folder / file))
    find(browser, "#name").send_keys(name)
    find(browser, "#texts").send_keys(texts)
    find(browser, "#put").click()


def test_upload_and_delete(browser, server, tmp_path):
    opened(browser, server)
    put(browser, tmp_path, "cook", adapter_files(), "stew\nbroth\n")
    wait_until(lambda: text(browser, "#uploaded") == "cook is there" and "cook" in names(browser))
    assert server.call("GET", "/adapters/cook")[1]["texts"] == 2
    no_errors(browser)
    find(browser, "[aria-label='Delete cook']").click()
    wait_until(lambda: "cook" not in names(browser))
    assert "cook" not in server.names()
    put(browser, tmp_path, "torn", (adapter_files()[0], b"torn"))
    wait_until(lambda: "truncated" in text(browser, "#uploaded"))
    assert "torn" not in server.names()
    # Chromium itself logs the status
    assert all("422" in line["message"] for line in browser.get_log("browser"))


def test_the_key_is_asked_for(browser, tmp_path):
    with serving(tmp_path / "store", api_key="s3cret") as server:
        opened(browser, server)
        wait_until(lambda: find(browser, "#none").is_displayed())
        wait_until(lambda: browser.execute_script("return locked"))
        put(browser, tmp_path, "poet", adapter_files())
        wait_until(lambda: find(browser, "#ask-key").get_property("open"))
        find(browser, "#key").send_keys("wrong")
        find(browser, "#key-form button").click()
        # it is asked for again
        wait_until(
            lambda: find(browser, "#ask-key").get_property("open") and find(browser, "#key").get_property("value") == ""
        )
        find(browser, "#key").send_keys("s3cret")
        find(browser, "#key-form button").click()
        wait_until(lambda: names(browser) == ["poet"])
        find(browser, "[aria-label='Delete poet']").click()
        wait_until(lambda: names(browser) == [])
        assert all("401" in line["message"] for line in browser.get_log("browser"))


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(browser, server, width, scheme, tmp_path):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        opened(browser, server)
        find(browser, "#prompt").send_keys("a rhyme " + "and-a-word-without-end" * 10)
        find(browser, "#send").click()
        wait_until(lambda: "tokens in" in text(browser, "#told"))
        inner, outer = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert inner <= outer == width
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, ground[4:-1].split(","))) < 60) == (scheme == "dark")
        if folder := os.environ.get("LORAKERN_SCREENSHOTS"):
            browser.save_screenshot(f"{folder}/page-{width}-{scheme}.png")
        no_errors(browser)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
