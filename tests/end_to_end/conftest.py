"""One short run after a plan, and a browser to look at what they leave."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from tests.playbook import ROOT, Playbook

STEPS = 12


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where plans are brought home."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="session")
def screen(plans: Path) -> str:
    """What a short run prints, shown as it comes; it must end well."""
    options = {"gmm": True, "max_steps": STEPS, "plan": True, "accelerator_type": "v5p-8"}
    run = Playbook("train.yml", train_plans_dir=str(plans), **options)
    assert run.end(seconds=1800) == 0
    return run.screen


@pytest.fixture(scope="session")
def report(screen: str) -> dict:
    return json.loads((ROOT / "runs/latest/report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """Debian's Chromium, without a screen."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=ChromeService("/usr/bin/chromedriver"))
    yield chrome
    chrome.quit()
