"""Tell whether a worker can train, or follow the run that it has, and else why not.

The tasks before have looked at the worker; here it is judged, all at once, so that one look at a
slice tells of every worker what keeps it from training and what to do about it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

IDENTITY = "mixtral-trainer.inputs"

# What the module trainer_state returned for a worker
Look = Mapping[str, Any]


def differences(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return in which flags and variables a container differs from what is ``wanted``.

    Both have a ``command``, a list, and an ``environment``. A container's may hold more variables,
    those of its image.
    """
    has, wants = pairs(state["command"]), pairs(wanted["command"])
    changed = [name for name in has | wants if has.get(name) != wants.get(name)]
    flags = [f"{name} {has.get(name, 'not given')}".strip() for name in changed]
    environment = state["environment"]
    return flags + [
        f"{name}={environment.get(name, '')}"
        for name, value in wanted["environment"].items()
        if environment.get(name) != value
    ]


def pairs(command: list[str]) -> dict[str, str]:
    """Return the flags of a command line, each with its value, empty where it has none."""
    flags: dict[str, str] = {}
    name = ""
    for word in command:
        if word.startswith("--"):
            name = word
            flags[name] = ""
        else:
            flags[name] = f"{flags.get(name, '')} {word}".strip()
    return flags


def live_run(look: Look, wanted: Mapping[str, Any], name: str = "") -> str | None:
    """Return the run that can be followed on a worker: one that goes on, or one that was left to
    itself and that nobody has brought home since, if it is what is wanted now, also by its
    ``name``.
    """
    state = look["state"]
    if not state:
        return None
    waits = state["detached"] and not look["collected"] and not differences(state, wanted)
    waits = waits and name in ("", state["run_id"])
    return state["run_id"] if state["running"] or waits else None


def broken_off_run(look: Look, wanted: Mapping[str, Any], name: str = "") -> str | None:
    """Return the run that can be resumed on a worker, for it has a checkpoint of it: the one of
    that ``name``, else the last one, if it did not succeed and is what is wanted now.
    """
    state = look["state"]
    if look["checkpoint"] is None:
        return None
    if name or not state:
        return name or None
    return None if state["exit_code"] == 0 or differences(state, wanted) else state["run_id"]


def resume_complaints(
    own: str, looks: Mapping[str, Look], wanted: Mapping[str, Any], resume: str, name: str
) -> Iterator[str]:
    """Yield why no run can be resumed on worker ``own``, where one has to be, or must not start.

    Where ``resume`` is ``bucket``, checkpoints are not on workers, and the trainer looks for them.
    """
    anew = "Start anew: -e resume=never"
    if resume == "never":
        if name and looks[own]["exists"]:
            yield f"Run {name} is here already, and resume is never. Give another run_name"
        return
    if resume == "bucket":
        return
    runs = {worker: broken_off_run(look, wanted, name) for worker, look in looks.items()}
    others = {worker: run for worker, run in runs.items() if run not in (None, runs[own])}
    if others and not runs[own]:
        worker, run = next(iter(others.items()))
        yield f"There is no checkpoint here of run {run}, of which {worker} has one. {anew}"
    elif name and looks[own]["exists"] and not runs[own]:
        yield (
            f"Run {name} is here already, without a checkpoint to resume from. Give another "
            f"run_name, or remove ~/mixtral-trainer/runs/{name}"
        )
    elif others:
        yield f"Run {runs[own]} would be resumed here, and others on {', '.join(others)}. {anew}"
    elif resume == "must" and not runs[own]:
        yield f"resume is must, and {_nothing_to_resume(looks[own], wanted, name)}"


def _nothing_to_resume(look: Look, wanted: Mapping[str, Any], name: str) -> str:
    state = look["state"]
    if look["checkpoint"] is None or not state:
        what = f"of run {name}" if name else "of a last run"
        return (
            f"there is no checkpoint {what} here. Runs save checkpoints with "
            "-e save_strategy=steps; take resume=auto to start the first one"
        )
    resumed = f"To go on from it all the same: -e run_name={state['run_id']}"
    if other := differences(state, wanted):
        return f"run {state['run_id']} had other variables (it has {', '.join(other)}). {resumed}"
    return f"run {state['run_id']} has succeeded. {resumed} and a larger max_steps"


def run_complaints(
    own: str,
    looks: Mapping[str, Look],
    wanted: Mapping[str, Any],
    name: str = "",
    detach: bool = False,
) -> Iterator[str]:
    """Yield why the run that is on worker ``own`` cannot be followed, or be left to itself where it
    is to ``detach``, if so.
    """
    runs = {worker: live_run(look, wanted, name) for worker, look in looks.items()}
    state = looks[own]["state"]
    here = (
        f"Run {runs[own]}, started by {state['started_by']} at {state['started']}, is training here"
    )
    without = [worker for worker, run in runs.items() if run != runs[own]]
    if without:
        yield (
            f"{here}, but not on {', '.join(without)}: half a run. "
            "End it: ansible-playbook stop.yml"
        )
    elif name not in ("", runs[own]):
        yield (
            f"{here}, and run_name is {name}. Wait for its end, or end it: "
            "ansible-playbook stop.yml"
        )
    elif other := differences(state, wanted):
        yield (
            f"{here} with other variables (it has {', '.join(other)}). Wait for its end, or end "
            "it: ansible-playbook stop.yml"
        )
    elif detach and not state["detached"]:
        yield (
            f"{here} under a lease, which nobody would renew with detach. Follow it: the same "
            "train.yml without detach; or end it first: ansible-playbook stop.yml"
        )


def image_complaints(name: str, found: list[Mapping[str, Any]], identity: str) -> Iterator[str]:
    """Yield what is wrong with a worker's image ``name``; ``identity`` is that of the right one."""
    if not found:
        yield f"There is no image {name}. Bring it: ansible-playbook site.yml"
        return
    has = (found[0]["Config"]["Labels"] or {}).get(IDENTITY, "")
    if identity and has != identity:
        yield (
            f"The image {name} was built from other files ({IDENTITY} is {has[:12] or 'not set'}) "
            f"than those on the controller ({identity[:12]}). "
            "Bring the right one: ansible-playbook site.yml"
        )


def stack_complaints(stack: str, venv: str, there: bool) -> Iterator[str]:
    """Yield that the virtual environment ``venv`` of the ``stack`` is not on the worker."""
    if not there:
        yield (
            f"There is no {venv}, in which the stack {stack} would be. "
            f"Install it: ansible-playbook site.yml -e runtime=native -e stack={stack}"
        )


def configuration_complaints(results: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield which of a worker's files is not the controller's.

    Each of the ``results`` is one of the module stat, whose item has the controller's file as
    ``source``.
    """
    for result in results:
        path, source = result["stat"].get("path"), result["item"]["source"]
        name = path or f"~/{result['item']['name']}"
        if not result["stat"]["exists"]:
            yield f"{name} is missing. Push it: ansible-playbook site.yml --tags config"
        elif result["stat"]["checksum"] != hashlib.sha1(Path(source).read_bytes()).hexdigest():
            yield (
                f"{name} is not the same as {source} on the controller. "
                "Push it: ansible-playbook site.yml --tags config"
            )


def accelerator_complaints(users: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield which processes hold the accelerator."""
    for user in users:
        yield (
            f"Process {user['pid']} ({user['command'][:80]}) holds {user['path']}. "
            f"Wait for its end, or end it on the worker: sudo kill {user['pid']}"
        )


def disk_complaints(free_gib: float, needed_gib: float) -> Iterator[str]:
    """Yield that there is too little room for what a run writes."""
    if free_gib < needed_gib:
        yield (
            f"{free_gib:.2f} GiB of disk are free for the run's files; {needed_gib:g} are needed. "
            "Free some: old runs are in ~/mixtral-trainer/runs"
        )


class ActionModule(ActionBase):
    """``assess_worker``: see roles/train/tasks/preflight.yml for its arguments."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(
        (
            "accelerator_users",
            "configuration",
            "detach",
            "free_gib",
            "identity",
            "image",
            "images",
            "looks",
            "name",
            "needed_gib",
            "resume",
            "runtime",
            "stack",
            "venv",
            "venv_is_there",
            "wanted",
        )
    )

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Fail with every complaint; else tell with ``run_id`` which run is to be followed, or with
        ``resumes`` which one is to be resumed.
        """
        super().run(tmp, task_vars)
        args, own = self._task.args, task_vars["inventory_hostname"]
        run_id = live_run(args["looks"][own], args["wanted"], args["name"])
        complaints = list(self._complaints(args, own, run_id))
        if complaints:
            return {"failed": True, "msg": "\n".join(complaints)}
        resumes = None
        if not run_id and args["resume"] != "never":
            resumes = broken_off_run(args["looks"][own], args["wanted"], args["name"])
        return {"changed": False, "run_id": run_id, "resumes": resumes}

    def _complaints(self, args: Mapping[str, Any], own: str, run_id: str | None) -> Iterator[str]:
        native = args["runtime"] == "native"
        if not native and not args["looks"][own]["engine"]:
            yield "No Docker engine answers. Provision the worker: ansible-playbook site.yml"
        elif run_id:
            yield from run_complaints(
                own, args["looks"], args["wanted"], args["name"], args["detach"]
            )
        else:
            yield from resume_complaints(
                own, args["looks"], args["wanted"], args["resume"], args["name"]
            )
            if native:
                yield from stack_complaints(args["stack"], args["venv"], args["venv_is_there"])
            else:
                yield from image_complaints(args["image"], args["images"], args["identity"])
            # In check mode nothing was pushed.
            if not self._task.check_mode:
                yield from configuration_complaints(args["configuration"])
            yield from accelerator_complaints(args["accelerator_users"])
            yield from disk_complaints(args["free_gib"], args["needed_gib"])
