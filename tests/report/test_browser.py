"""The page in a real headless Chromium: it draws everything, says nothing on the console and asks for nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from example import comparison, example_run, hostile_run, inspection, policy_comparison, two_stacks

from billhook.plan.record import Run
from billhook.report.comparison import comparison_page
from billhook.report.page import page
from billhook.report.policy_comparison import policy_comparison_page

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)", allow_module_level=True)

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# how many visible plots hold dots, a map, bars
DRAWN = """
const plots = [...document.querySelectorAll(".js-plotly-plot")].filter(plot => {
  const box = plot.querySelector("svg.main-svg")?.getBoundingClientRect();
  return box && box.width > 200 && box.height > 100;
});
return [".scatterlayer .point", ".heatmaplayer image", ".barlayer .point"].map(
  marks => plots.filter(plot => plot.querySelector(marks)).length);
"""


@dataclass(frozen=True)
class Seen:
    """What the browser logged while it opened a page."""

    console: list[str]
    requests: list[str]
    drawn: list[int]


class Browser:
    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, text: str, width: int = 1280) -> Seen:
        """Open a page, give late errors and requests a moment, and take the logs of just this visit."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self._logs()
        path = self.folder / "report.html"
        path.write_text(text, encoding="utf-8")
        self.driver.get(path.as_uri())
        self.driver.execute_async_script("setTimeout(arguments[0], 500)")
        console, requests = self._logs()
        return Seen(console, [u for u in requests if u != path.as_uri()], self.driver.execute_script(DRAWN))

    def _logs(self) -> tuple[list[str], list[str]]:
        console = [entry["message"] for entry in self.driver.get_log("browser")]
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        own = ("data:", "blob:", "chrome:")  # the last are the browser's, for its first empty page
        return console, [url for url in urls if not url.startswith(own)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Browser(driver, folder)
    driver.quit()


@pytest.mark.parametrize(
    ("run", "width", "plots"),
    [
        (example_run(), 1280, [6, 1, 1]),  # dots: path, speed, three scores, on the map
        (example_run(), 390, [6, 1, 1]),
        (example_run(blocks=100), 1280, [6, 1, 1]),
        (inspection(), 1280, [4, 1, 0]),
        (two_stacks(), 390, [0, 0, 0]),
        (hostile_run(), 1280, [6, 1, 1]),
    ],
    ids=["whole", "phone", "deep", "inspection", "two stacks", "hostile"],
)
def test_draws_everything_and_asks_for_nothing(browser: Browser, run: Run, width: int, plots: list[int]) -> None:
    assert browser.open(page(run), width) == Seen(console=[], requests=[], drawn=plots)
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("hostile", [False, True])
def test_a_comparison_draws_everything(browser: Browser, width: int, hostile: bool) -> None:
    compared = comparison_page(comparison(hostile=hostile))
    assert browser.open(compared, width) == Seen(console=[], requests=[], drawn=[1, 0, 0])
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.driver.execute_script("return window.owned") is None
    assert browser.driver.execute_script("return document.querySelectorAll('.grid .cell.cut').length") > 100


@pytest.mark.parametrize(("width", "hostile"), [(1280, False), (390, True)])
def test_a_comparison_of_policies_draws_everything(browser: Browser, width: int, hostile: bool) -> None:
    compared = policy_comparison_page(policy_comparison(hostile=hostile))
    assert browser.open(compared, width) == Seen(console=[], requests=[], drawn=[2, 0, 0])
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.driver.execute_script("return window.owned") is None
    assert browser.driver.execute_script("return document.querySelectorAll('.grid .cell.less').length") == 8


def test_hostile_text_is_shown_not_run(browser: Browser) -> None:
    browser.open(page(hostile_run()))
    assert browser.driver.execute_script("return window.owned") is None
    shown = browser.driver.execute_script("return document.querySelector('.sides p').textContent")
    assert shown == "</p></script><script>owned = 1</script><img src=x onerror='owned = 1'>"


def test_dark_and_light_differ_and_paper_is_light(browser: Browser) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        assert browser.open(page(inspection())).console == []
        colours[scheme] = browser.driver.execute_script(
            "return [getComputedStyle(document.body).backgroundColor, document.querySelector('.xtick text').style.fill]"
        )
    browser.driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    printed = browser.driver.execute_script("return document.querySelector('.xtick text').style.fill")
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours["light"][0] != colours["dark"][0]
    assert colours["light"][1] != colours["dark"][1]
    assert printed == colours["light"][1]


@pytest.mark.parametrize(
    ("addition", "keep_policy", "notices"),
    [
        ("<script>throw new Error('broken')</script>", True, "console"),
        ("<img src='http://127.0.0.1:9/pixel.png'>", False, "requests"),
        ("<img src='http://127.0.0.1:9/pixel.png'>", True, "console"),  # the page's own policy refuses it
    ],
)
def test_the_check_itself_can_fail(browser: Browser, addition: str, keep_policy: bool, notices: str) -> None:
    text = page(two_stacks()).replace("</body>", f"{addition}</body>")
    if not keep_policy:
        text = text.replace("Content-Security-Policy", "nothing")
    assert getattr(browser.open(text), notices)


def test_a_plot_that_fails_is_missed(browser: Browser) -> None:
    without_map = page(inspection()).replace('"type":"heatmap"', '"type":"nothing"')
    assert browser.open(without_map).drawn == [4, 0, 0]
    assert browser.open(page(inspection()).replace("onScreen();\n", "")).drawn == [0, 0, 0]
