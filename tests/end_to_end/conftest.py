"""One short run after a plan, and a browser to look at what they leave."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where plans are brought home."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="session")
def screen(plans: Path) -> str:
    """What a short run prints, shown as it comes; it must end well."""
    command = ["ansible-playbook", "train.yml", "-e", "gmm=true", "-e", f"max_steps={STEPS}"]
    command += ["-e", "plan=true", "-e", "accelerator_type=v5p-8", "-e", f"train_plans_dir={plans}"]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    assert run.returncode == 0
    return "".join(lines)


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
