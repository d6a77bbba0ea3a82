"""``python -m report RUN_DIR`` writes report.json and report.html from a run's fetched files;
``python -m report compare RUN_DIR RUN_DIR …`` compares runs.

Runs on the controller and does not import torch. An unknown number is null in the report, and
``notes`` say which file or data was missing.
"""

import sys
from pathlib import Path

from trainer.metrics import write_json

from . import compare, html
from .numbers import build
from .run_dir import read_workers

USAGE = """usage: python -m report RUN_DIR
       python -m report compare RUN_DIR RUN_DIR …
RUN_DIR is the directory of one run and holds workers/"""


def main(argv: list[str]) -> int:
    """Report on a run or compare runs; print the path of the page. Return the exit code."""
    comparing = argv[:1] == ["compare"]
    run_dirs = [Path(argument) for argument in argv[comparing:]]
    wrong = [str(path) for path in run_dirs if not (path / "workers").is_dir()]
    if wrong or (len(run_dirs) < 2 if comparing else len(run_dirs) != 1):
        print(f"{USAGE}; got {wrong or argv}", file=sys.stderr)
        return 2
    notes: list[list[str]] = [[] for _ in run_dirs]
    workers = [read_workers(path, into) for path, into in zip(run_dirs, notes, strict=True)]
    reports = [build(*run) for run in zip(run_dirs, workers, notes, strict=True)]
    if comparing:
        print(compare.show(run_dirs, reports, workers))
        return 0
    write_json(run_dirs[0] / "report.json", reports[0])
    page = run_dirs[0] / "report.html"
    page.write_text(html.render(run_dirs[0], reports[0], workers[0]), encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
