"""What a person sees in a browser after a run: the report, and TensorBoard's page of profiles."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import (
    frame_to_be_available_and_switch_to_it,
    text_to_be_present_in_element,
)
from selenium.webdriver.support.ui import WebDriverWait

from report.__main__ import main
from tests.report.profiles import tpu_worker

ROOT = Path(__file__).resolve().parents[2]
PORT = 6016
UNITS = {"s": 1, "ms": 1e-3, "µs": 1e-6, "GiB": 2**30}


def figures(browser: Chrome) -> dict[str, str]:
    """The page's numbers, by where they stand in report.json."""
    found = browser.find_elements(By.CSS_SELECTOR, "[data-key]")
    return {it.get_attribute("data-key"): it.text for it in found}


def value(text: str) -> str | float | None:
    """What a person reads in a number with its unit; None for a dash."""
    number, _, unit = text.replace(",", "").partition(" ")
    if number == "\N{EN DASH}":
        return None
    try:
        return float(number.removesuffix("%")) * (0.01 if number.endswith("%") else UNITS[unit])
    except (KeyError, ValueError):
        return float(number) if number.replace(".", "").isdigit() else text


def at(report: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        report = report[part]
    return report


def assert_page_tells(browser: Chrome, report: dict[str, Any]) -> None:
    shown = figures(browser)
    for key, text in shown.items():
        expected = at(report, key)
        if isinstance(expected, int | float):
            expected = pytest.approx(expected, rel=5e-3, abs=6e-4)
        assert (text if key == "run_id" else value(text)) == expected, key
    assert {"step_time_s.p50", "tokens_per_s_per_device", "mfu", "loss.last"} <= shown.keys()


def problems(browser: Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def test_the_report_of_a_run_shows_its_numbers(browser: Chrome, report: dict) -> None:
    browser.get((ROOT / "runs/latest/report.html").resolve().as_uri())
    assert_page_tells(browser, report)
    drawn = browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .main-svg")
    assert {it.find_element(By.XPATH, "ancestor::section/h2").text for it in drawn} >= {
        "Loss",
        "Step time",
        "Where a step’s time goes",
    }
    variables = browser.find_element(By.XPATH, "//summary[contains(., 'Variables of the run')]")
    row = browser.find_element(By.XPATH, "//tr[td/code[text()='train_max_steps']]")
    assert not row.is_displayed()
    variables.click()
    assert row.text.split() == ["train_max_steps", "12"]
    assert problems(browser) == []


@pytest.fixture(scope="module")
def slice_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on three TPU hosts, all of whose numbers are there."""
    run = tmp_path_factory.mktemp("runs") / "20260101-100000"
    summary = {
        "model": {
            "name": "mixtral-8x7b",
            "params_total": 46_702_792_704,
            "params_active": 12_879_425_536,
            "block_size": 4096,
            "global_batch": 8,
        },
        "mesh": {"fsdp": 12, "tensor": 1},
        "experts": {"mode": "gmm", "kernel": "pallas_megablox"},
        "attention": {"kernel": "pallas_splash"},
        "device": {"kind": "v5p", "count": 12, "hosts": 3},
        "model_flops_per_token": 82.93e9,
        "peak_flops_per_device": 459e12,
        "compile": {"count": 1, "cached": 0, "seconds": 96.4, "last_step": 0},
        "peak_memory_bytes": 3 * 2**30,
    }
    step = {"loss": 3.5, "step_time_s": 1.0, "expert_load": [0.4, 0.2, 0.2, 0.2]}
    lines = [json.dumps({"step": number} | step) + "\n" for number in range(20)]
    for number, own_ms in enumerate((700, 710, 790)):
        worker = run / f"workers/w{number}"
        tpu_worker(own_ms).write(worker)
        (worker / "summary.json").write_text(json.dumps(summary))
        (worker / "metrics.jsonl").write_text("".join(lines))
    plan = {
        "accelerator_type": "v5p-24",
        "chips": 12,
        "flash_attention": True,
        "spmd_2d_sharding": 0,
        "experts": "gmm",
        "global_batch": 8,
        "block_size": 4096,
        "model_flops": 82.93e9 * 8 * 4096 / 12,
        "modelled": {"step_time_s": 0.9, "mfu": 0.4},
    }
    plans = run.parent / "plans"
    (plans / "v5p-24-0123").mkdir(parents=True)
    (plans / "v5p-24-0123/plan.json").write_text(json.dumps(plan))
    variables = {
        "train_accelerator_type": "v5p-24",
        "train_flash_attention": True,
        "train_spmd_2d_sharding": 0,
        "train_plans_dir": str(plans),
    }
    (run / "variables.yml").write_text(json.dumps(variables))
    assert main([str(run)]) == 0
    return run


def test_the_report_of_a_slice_names_who_is_slow(browser: Chrome, slice_run: Path) -> None:
    browser.get((slice_run / "report.html").as_uri())
    assert_page_tells(browser, json.loads((slice_run / "report.json").read_text()))
    shown = figures(browser)
    assert (shown["step_time_s.p50"], shown["mfu"]) == ("1.000 s", "49.3%")
    assert (shown["skew.slowest"], shown["skew.ratio"]) == ("w2", "1.125")
    assert shown["expert_load.max_over_mean"] == "1.600"
    assert shown["plan.modelled.step_time_s"] == "900.0 ms"
    notes = [it.text for it in browser.find_elements(By.CSS_SELECTOR, ".notes li")]
    assert notes == [f"w{number}: exit.json is missing" for number in range(3)]


def test_the_page_takes_the_reader_s_colors_and_fits_a_phone(
    browser: Chrome, slice_run: Path
) -> None:
    browser.get((slice_run / "report.html").as_uri())
    backgrounds = set()
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        body = browser.find_element(By.TAG_NAME, "body")
        backgrounds.add(body.value_of_css_property("background-color"))
    assert len(backgrounds) == 2
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.refresh()
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    # All of it is in the one file.
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert problems(browser) == []


def test_runs_stand_side_by_side(
    browser: Chrome, slice_run: Path, report: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(slice_run), str(ROOT / "runs/latest")]) == 0
    printed = capsys.readouterr().out
    browser.get((slice_run.parent / "compare.html").as_uri())
    rows = {
        row.get_attribute("data-row"): [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        for row in browser.find_elements(By.CSS_SELECTOR, "tr[data-row]")
    }
    assert rows["device.kind"] == ["v5p", "CPU"]
    assert value(rows["step time"][1]) == pytest.approx(report["step_time_s"]["p50"], rel=1e-3)
    ratio, _, spread = rows["ratio"][1].partition(" ")
    # Every step of the slice took one second.
    assert float(ratio) == pytest.approx(report["host_clock_s"]["p50"], abs=1e-3)
    low, high = spread.strip("()").split("–")
    assert float(low) <= float(ratio) <= float(high)
    assert rows["ratio"][1] in printed


@pytest.fixture(scope="module")
def tensorboard(report: dict) -> Iterator[str]:
    command = ["ansible-playbook", "tensorboard.yml", "-e", f"tensorboard_port={PORT}"]
    subprocess.run(command, cwd=ROOT, check=True)
    yield f"http://127.0.0.1:{PORT}/"
    subprocess.run([*command, "-e", "state=absent"], cwd=ROOT, check=True)


def test_tensorboard_opens_the_profile_of_the_run(
    browser: Chrome, tensorboard: str, report: dict
) -> None:
    (worker,) = report["workers"]
    session = f"{report['run_id']}/{Path(worker['profile']).parent}".replace("plugins/profile/", "")
    browser.get(f"{tensorboard}?run={session}#profile")
    wait = WebDriverWait(browser, 90)
    wait.until(frame_to_be_available_and_switch_to_it((By.TAG_NAME, "iframe")))
    wait.until(text_to_be_present_in_element((By.TAG_NAME, "body"), "Performance Summary"))
    page = browser.find_element(By.TAG_NAME, "body").text
    assert session in page
    assert "Device type: CPU" in page
