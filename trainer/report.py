"""``python -m trainer.report`` is the former name of ``python -m report``, and still runs it."""

import runpy

if __name__ == "__main__":
    runpy.run_module("report", run_name="__main__", alter_sys=True)
