"""Run a long command on the worker, and display its progress meanwhile."""

from __future__ import annotations

import shlex
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..filter.progress import clock
from ..plugin_utils.screen import show

SHOW_SECONDS = 10
LONGEST_POLL_SECONDS = 2
LAST_LINES = 20


def pack(root: Path, files: list[str], archive: Path) -> None:
    """Write ``files``, relative to ``root``, into a tar file, owned by root and readable by all."""

    def ownerless(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mode = 0o755 if member.mode & 0o100 else 0o644
        return member

    with tarfile.open(archive, "w") as tar:
        for name in files:
            tar.add(root / name, name, filter=ownerless)


class ActionModule(ActionBase):
    """The action ``run_with_progress``; its documentation is in plugins/modules."""

    _supports_check_mode = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send the files, start the command and wait until it ends."""
        result = super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "cmd": {"type": "str", "required": True},
                "root": {"type": "path"},
                "files": {"type": "list", "elements": "str"},
                "private": {"type": "dict", "default": {}},
                "would": {"type": "str", "required": True},
            },
            required_by={"files": ["root"]},
        )
        host = self._task.delegate_to or (task_vars or {}).get("inventory_hostname", "worker")
        if self._task.check_mode:
            show(f"  [{host}] would {args['would']}")
            return result | {"changed": True}

        directory = self._make_tmp_path()
        try:
            self._send(directory, args)
            self._start(directory, args["cmd"])
            code = self._follow(directory, host)
            lines = self._shell_out(directory, f"tail -n {LAST_LINES} log") if code else ""
        finally:
            # The command's files may belong to root, so they are removed with the same privileges.
            self._low_level_execute_command(f"rm -rf {shlex.quote(directory)}")
        result |= {"changed": True, "rc": code}
        if code:
            result |= {
                "failed": True,
                "msg": f"The command failed with exit code {code}. Its last lines:\n{lines}",
            }
        return result

    def _send(self, directory: str, args: dict[str, Any]) -> None:
        """Copy ``files`` and ``private`` to directories of these names in ``directory``."""
        self._shell_out(directory, "mkdir -m 700 files private", sudoable=False)
        for name, content in args["private"].items():
            self._transfer_data(f"{directory}/private/{name}", content)
        if args["files"]:
            with tempfile.TemporaryDirectory() as local:
                archive = Path(local) / "files.tar"
                pack(Path(args["root"]), args["files"], archive)
                self._transfer_file(str(archive), f"{directory}/files.tar")
            self._shell_out(directory, "tar -xf files.tar -C files", sudoable=False)

    def _start(self, directory: str, command: str) -> None:
        """Start ``command`` in its own session, which outlives the connection and the playbook."""
        script = (
            "echo $$ > pid; "
            f"{self._compute_environment_string()} /bin/sh -c {shlex.quote(command)}; "
            f"code=$?; rm -rf files private; echo $code > exit"
        )
        self._shell_out(
            directory,
            f"trap '' HUP; setsid /bin/sh -c {shlex.quote(script)} < /dev/null > log 2>&1 & "
            "until [ -s pid ]; do sleep 0.1; done",
        )

    def _follow(self, directory: str, host: str) -> int:
        """Display the last line every SHOW_SECONDS until the command ends; return its exit code."""
        started = last_display = time.monotonic()
        pause = 0.2
        while True:
            # The process is checked before its exit code: it writes the code before it ends.
            state, _, line = self._shell_out(
                directory,
                "kill -0 $(cat pid) 2> /dev/null && running=1; "
                "if [ -s exit ]; then cat exit; "
                'elif [ "$running" ]; then echo running; else echo gone; fi; '
                "tail -n 1 log | head -c 100",
            ).partition("\n")
            if state == "gone":
                raise AnsibleActionFail(
                    "The command ended without an exit code: it was killed, or the worker was "
                    f"restarted. Its last line: {line}. Run the playbook again"
                )
            if state != "running":
                return int(state)
            now = time.monotonic()
            if now - last_display >= SHOW_SECONDS:
                last_display = now
                show(f"  [{host}] {clock(now - started)}  {line.strip()}")
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_POLL_SECONDS)

    def _shell_out(self, directory: str, command: str, sudoable: bool = True) -> str:
        """Run a short shell command in ``directory`` on the worker; return what it printed."""
        ran = self._low_level_execute_command(
            command, sudoable=sudoable, chdir=shlex.quote(directory)
        )
        if ran["rc"]:
            raise AnsibleActionFail(
                f"A command failed on the worker: {command[:200]}: "
                f"{(ran['stderr'] or ran['stdout']).strip() or ran['rc']}"
            )
        # Over SSH, a terminal may end lines with \r\n.
        return ran["stdout"].replace("\r\n", "\n")
