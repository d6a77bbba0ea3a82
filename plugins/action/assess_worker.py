"""Check whether a worker can train, or has a run to follow; else fail with every obstacle at once.

The tasks before this one have collected what it judges, and it connects to no worker. So one run of
the preflight lists the obstacles of every worker of a slice, each with the command that removes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

IDENTITY = "mixtral-trainer.inputs"

# The result of the module trainer_state on one worker
Inspection = Mapping[str, Any]


def differences(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the flags and environment variables of a run that are not those ``wanted``, each with
    the run's value.

    Both arguments have a ``command``, a list, and an ``environment``. A container's environment may
    have further variables, those of its image.
    """
    existing, flags = flag_values(state["command"]), flag_values(wanted["command"])
    changed = [name for name in existing | flags if existing.get(name) != flags.get(name)]
    environment = state["environment"]
    return [f"{name} {existing.get(name, 'not given')}".strip() for name in changed] + [
        f"{name}={environment.get(name, '')}"
        for name, value in wanted["environment"].items()
        if environment.get(name) != value
    ]


def flag_values(command: list[str]) -> dict[str, str]:
    """Return the flags of a command line with their values, empty for a flag without a value."""
    flags: dict[str, str] = {}
    name = ""
    for word in command:
        if word.startswith("--"):
            name = word
            flags[name] = ""
        else:
            flags[name] = f"{flags.get(name, '')} {word}".strip()
    return flags


def run_to_follow(inspection: Inspection, wanted: Mapping[str, Any], name: str = "") -> str | None:
    """Return the id of a worker's run that can be followed, None if there is none.

    That is a run in progress; or a detached run that has ended, whose files were not fetched yet,
    which is the ``wanted`` one, and which has the ``name`` if one is given.
    """
    state = inspection["state"]
    if not state:
        return None
    waits = (
        state["detached"]
        and not inspection["collected"]
        and not differences(state, wanted)
        and name in ("", state["run_id"])
    )
    return state["run_id"] if state["running"] or waits else None


def run_to_resume(inspection: Inspection, wanted: Mapping[str, Any], name: str = "") -> str | None:
    """Return the id of a worker's run that can be resumed from a checkpoint, None if there is none.

    That is the run ``name``; without a name the last one, if it failed and is the ``wanted`` one.
    """
    state = inspection["state"]
    if inspection["checkpoint"] is None:
        return None
    if name or not state:
        return name or None
    return None if state["exit_code"] == 0 or differences(state, wanted) else state["run_id"]


def resume_errors(
    own: str,
    inspections: Mapping[str, Inspection],
    wanted: Mapping[str, Any],
    resume: str,
    name: str,
    runs_dir: str,
) -> Iterator[str]:
    """Yield why worker ``own`` cannot resume a run that it has to resume, or cannot start anew.

    With ``resume`` as ``bucket`` checkpoints are not on the workers, and the trainer looks for
    them. ``runs_dir`` is the directory of all runs on the worker.
    """
    anew = "To start a new run: -e resume=never"
    if resume == "never":
        if name and inspections[own]["exists"]:
            yield (
                f"Run {name} exists on this worker already, and resume is never. Give another "
                "run_name"
            )
        return
    if resume == "bucket":
        return
    runs = {worker: run_to_resume(found, wanted, name) for worker, found in inspections.items()}
    others = {worker: run for worker, run in runs.items() if run not in (None, runs[own])}
    if others and not runs[own]:
        worker, run = next(iter(others.items()))
        yield f"This worker has no checkpoint of run {run}, and {worker} has one. {anew}"
    elif name and inspections[own]["exists"] and not runs[own]:
        yield (
            f"Run {name} exists on this worker already, without a checkpoint to resume from. Give "
            f"another run_name, or delete {runs_dir}/{name}"
        )
    elif others:
        yield (
            f"This worker would resume run {runs[own]}, and {', '.join(others)} another one. {anew}"
        )
    elif resume == "must" and not runs[own]:
        yield f"resume is must, and {_nothing_to_resume(inspections[own], wanted, name)}"


def _nothing_to_resume(inspection: Inspection, wanted: Mapping[str, Any], name: str) -> str:
    state = inspection["state"]
    if inspection["checkpoint"] is None or not state:
        run = f"run {name}" if name else "an earlier run"
        return (
            f"this worker has no checkpoint of {run}. Runs save checkpoints with "
            "-e save_strategy=steps; -e resume=auto starts the first one"
        )
    resumed = f"To resume run {state['run_id']} nevertheless: -e run_name={state['run_id']}"
    if different := differences(state, wanted):
        return (
            f"the last run, {state['run_id']}, had other variables ({', '.join(different)}). "
            f"{resumed}"
        )
    return f"the last run, {state['run_id']}, has succeeded. {resumed} and a larger max_steps"


def follow_errors(
    own: str,
    inspections: Mapping[str, Inspection],
    wanted: Mapping[str, Any],
    name: str = "",
    detach: bool = False,
) -> Iterator[str]:
    """Yield why the run in progress on worker ``own`` cannot be followed, or not be detached where
    ``detach`` asks for it.
    """
    runs = {worker: run_to_follow(found, wanted, name) for worker, found in inspections.items()}
    state = inspections[own]["state"]
    run = (
        f"Run {runs[own]}, started by {state['started_by']} at {state['started']}, is training on "
        "this worker"
    )
    end = "ansible-playbook stop.yml"
    without = [worker for worker, other in runs.items() if other != runs[own]]
    if without:
        yield f"{run}, but not on {', '.join(without)}. End the run on all workers: {end}"
    elif name not in ("", runs[own]):
        yield f"{run}, and run_name is {name}. Wait until the run ends, or end it: {end}"
    elif different := differences(state, wanted):
        yield (
            f"{run} with other variables ({', '.join(different)}). Wait until the run ends, or end "
            f"it: {end}"
        )
    elif detach and not state["detached"]:
        yield (
            f"{run} under a lease, which no one would renew for a detached run. Follow the run "
            f"with the same train.yml without detach, or end it first: {end}"
        )


def image_errors(name: str, images: list[Mapping[str, Any]], identity: str) -> Iterator[str]:
    """Yield that a worker has no image ``name``, or one with another ``identity``.

    ``images`` is what the engine says of the image, empty where it has none. An empty ``identity``
    allows every image.
    """
    if not images:
        yield f"There is no image {name}. Install the image: ansible-playbook site.yml"
        return
    existing = (images[0]["Config"]["Labels"] or {}).get(IDENTITY, "")
    if identity and existing != identity:
        yield (
            f"The image {name} was built from other files ({IDENTITY} is "
            f"{existing[:12] or 'not set'}) than those on the controller ({identity[:12]}). "
            "Install the controller's image: ansible-playbook site.yml"
        )


def stack_errors(stack: str, venv: str, exists: bool) -> Iterator[str]:
    """Yield that the worker lacks ``venv``, the virtual environment of the ``stack``."""
    if not exists:
        yield (
            f"The stack {stack} is not installed: there is no {venv}. "
            f"Install it: ansible-playbook site.yml -e runtime=native -e stack={stack}"
        )


def configuration_errors(results: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each configuration file that is missing on a worker or differs from the controller's.

    ``results`` are those of the module stat; the item of each has the file's ``name`` in the user's
    home and its ``source`` on the controller.
    """
    copy = "Copy the controller's file: ansible-playbook site.yml --tags config"
    for result in results:
        path, source = result["stat"].get("path"), result["item"]["source"]
        name = path or f"~/{result['item']['name']}"
        if not result["stat"]["exists"]:
            yield f"{name} is missing. {copy}"
        elif result["stat"]["checksum"] != hashlib.sha1(Path(source).read_bytes()).hexdigest():
            yield (f"{name} is not the same as {source} on the controller. {copy}")


def accelerator_errors(users: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each process that holds the accelerator."""
    for user in users:
        yield (
            f"Process {user['pid']} ({user['command'][:80]}) holds {user['path']}. "
            f"Wait until the process ends, or end it on the worker: sudo kill {user['pid']}"
        )


def disk_errors(free_gib: float, needed_gib: float, runs_dir: str) -> Iterator[str]:
    """Yield that the file system of ``runs_dir`` has too little free space for a run's files."""
    if free_gib < needed_gib:
        yield (
            f"{free_gib:.2f} GiB of disk are free for the run's files; {needed_gib:g} are needed. "
            f"Delete old runs from {runs_dir}"
        )


class ActionModule(ActionBase):
    """The action ``assess_worker``; its documentation is in plugins/modules."""

    _requires_connection = False
    _supports_check_mode = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Fail with every obstacle. Otherwise return the run to follow as ``run_id`` and the run to
        resume as ``resumes``, each None where there is none.
        """
        super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "inspections": {"type": "dict", "required": True},
                "wanted": {"type": "dict", "required": True},
                "resume": {
                    "type": "str",
                    "choices": ["auto", "bucket", "must", "never"],
                    "required": True,
                },
                "name": {"type": "str", "default": ""},
                "detach": {"type": "bool", "default": False},
                "runtime": {"type": "str", "choices": ["container", "native"], "required": True},
                "runs_dir": {"type": "str", "required": True},
                "stack": {"type": "str", "required": True},
                "venv": {"type": "str", "required": True},
                "venv_exists": {"type": "bool", "required": True},
                "image": {"type": "str", "required": True},
                "images": {"type": "list", "elements": "dict", "required": True},
                "identity": {"type": "str", "default": ""},
                "configuration": {"type": "list", "elements": "dict", "required": True},
                "accelerator_users": {"type": "list", "elements": "dict", "required": True},
                "free_gib": {"type": "float", "required": True},
                "needed_gib": {"type": "float", "required": True},
            }
        )
        own = task_vars["inventory_hostname"]
        inspection = args["inspections"][own]
        run_id = run_to_follow(inspection, args["wanted"], args["name"])
        errors = list(self._errors(args, own, run_id))
        if errors:
            return {"failed": True, "msg": "\n".join(errors)}
        resumes = None
        if not run_id and args["resume"] != "never":
            resumes = run_to_resume(inspection, args["wanted"], args["name"])
        return {"changed": False, "run_id": run_id, "resumes": resumes}

    def _errors(self, args: Mapping[str, Any], own: str, run_id: str | None) -> Iterator[str]:
        inspections, wanted, name = args["inspections"], args["wanted"], args["name"]
        native = args["runtime"] == "native"
        if not native and not inspections[own]["engine"]:
            yield (
                "The Docker engine does not answer. Provision the worker: ansible-playbook site.yml"
            )
        elif run_id:
            yield from follow_errors(own, inspections, wanted, name, args["detach"])
        else:
            yield from resume_errors(
                own, inspections, wanted, args["resume"], name, args["runs_dir"]
            )
            if native:
                yield from stack_errors(args["stack"], args["venv"], args["venv_exists"])
            else:
                yield from image_errors(args["image"], args["images"], args["identity"])
            # In check mode site.yml has copied nothing.
            if not self._task.check_mode:
                yield from configuration_errors(args["configuration"])
            yield from accelerator_errors(args["accelerator_users"])
            yield from disk_errors(args["free_gib"], args["needed_gib"], args["runs_dir"])
