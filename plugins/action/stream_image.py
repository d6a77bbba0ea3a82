"""Stream an image's archive into the worker's Docker engine, and display the progress."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..filter.progress import clock
from ..plugin_utils.screen import show

SHOW_SECONDS = 10
MIB = 1 << 20


def progress(seconds: float, sent: int, size: int) -> str:
    """Return the line that is displayed after ``seconds`` with ``sent`` of ``size`` bytes sent."""
    if sent == size:
        return (
            f"{clock(seconds)}  all {size // MIB:,} MiB sent, the Docker engine is unpacking them"
        )
    return f"{clock(seconds)}  {sent // MIB:,} of {size // MIB:,} MiB"


class ActionModule(ActionBase):
    """The action ``stream_image``; its documentation is in plugins/modules."""

    _supports_check_mode = False

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Stream the archive; fail with docker's own message unless docker has loaded it."""
        result = super().run(tmp, task_vars)
        _, args = self.validate_argument_spec({"archive": {"type": "path", "required": True}})
        # This also opens the SSH connection, with all of Ansible's options; the stream shares it.
        found = self._low_level_execute_command("command -v docker")
        if found["rc"]:
            raise AnsibleActionFail(
                "There is no docker client on this worker. Install Docker first: "
                "ansible-playbook site.yml"
            )
        command = self._command("docker load --quiet")
        host = (task_vars or {}).get("inventory_hostname", "worker")
        with Path(args["archive"]).open("rb") as archive, tempfile.TemporaryFile() as errors:
            # Files, not pipes: ssh's background process would keep a pipe open after the end.
            process = subprocess.Popen(
                command, stdin=archive, stdout=subprocess.DEVNULL, stderr=errors
            )
            sent, size = self._follow(process, archive, host)
            errors.seek(0)
            message = errors.read().decode(errors="replace").strip()
        code = process.returncode
        result |= {"changed": True, "rc": code}
        if code:
            result |= {
                "failed": True,
                "msg": f"The image was not loaded: {message or f'exit code {code}'}. "
                f"{sent // MIB:,} of {size // MIB:,} MiB were sent, and the worker keeps none of "
                "them. Remove the cause, and run the playbook again.",
            }
        return result

    def _command(self, command: str) -> list[str | bytes]:
        """Return the local command that runs ``command`` on the worker as the task's user."""
        connection = self._connection
        become = connection.become
        if become and self.get_become_option("become_user") != self._get_remote_user():
            if become.get_option("become_pass"):
                raise AnsibleActionFail(
                    f"{become.name} asks for a password on this worker, which cannot be given "
                    "while an image is streamed. Allow it without a password, or set "
                    "image_source to build or registry."
                )
            command = become.build_become_command(command, connection._shell)
        if connection.transport == "local":
            return ["/bin/sh", "-c", command]
        if connection.transport == "ssh":
            ssh = connection.get_option("ssh_executable")
            return connection._build_command(ssh, "ssh", connection.host, command)
        raise AnsibleActionFail(
            f"The connection is {connection.transport}; an image can be streamed over ssh and "
            "local. Set image_source to build or registry."
        )

    def _follow(
        self, process: subprocess.Popen[bytes], archive: BinaryIO, host: str
    ) -> tuple[int, int]:
        """Display the progress until ``process`` ends; return the bytes sent and their total."""
        started, size = time.monotonic(), os.fstat(archive.fileno()).st_size
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SHOW_SECONDS)
            # The process reads through the same open file, so both share one position.
            sent = os.lseek(archive.fileno(), 0, os.SEEK_CUR)
            if process.returncode is not None:
                return sent, size
            line = progress(time.monotonic() - started, sent, size)
            show(f"  [{host}] {line}")
