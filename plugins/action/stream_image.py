"""Stream an image's archive into the worker's Docker engine and show, while it flows, how far."""

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
from ansible.plugins.loader import filter_loader
from ansible.utils.display import Display

SHOW_SECONDS = 10
MIB = 1 << 20
clock = filter_loader.get("clock").j2_function

display = Display()


def progress(seconds: float, sent: int, size: int) -> str:
    """Return the line that says how far it is after ``seconds``."""
    if sent == size:
        return f"{clock(seconds)}  all {size // MIB:,} MiB sent, the engine unpacks them"
    return f"{clock(seconds)}  {sent // MIB:,} of {size // MIB:,} MiB"


class ActionModule(ActionBase):
    """The action ``stream_image``; its documentation is in plugins/modules."""

    _supports_check_mode = False

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Stream the archive; fail with docker's words unless it took all of it."""
        result = super().run(tmp, task_vars)
        _, args = self.validate_argument_spec({"archive": {"type": "path", "required": True}})
        # It opens the connection that the stream then shares, with all that Ansible knows of it.
        found = self._low_level_execute_command("command -v docker")
        if found["rc"]:
            raise AnsibleActionFail("There is no docker client on this worker.")
        command = self._command("docker load --quiet")
        host = (task_vars or {}).get("inventory_hostname", "worker")
        with Path(args["archive"]).open("rb") as archive, tempfile.TemporaryFile() as errors:
            # Files, not pipes: a connection that ssh keeps open in the background holds on to them.
            process = subprocess.Popen(
                command, stdin=archive, stdout=subprocess.DEVNULL, stderr=errors
            )
            sent, size = self._follow(process, archive, host)
            errors.seek(0)
            words = errors.read().decode(errors="replace").strip()
        code = process.returncode
        result |= {"changed": True, "rc": code}
        if code:
            result |= {
                "failed": True,
                "msg": f"The image was not loaded: {words or f'exit code {code}'}. "
                f"{sent // MIB:,} of {size // MIB:,} MiB were sent, and nothing of it stays on the "
                "worker. Run it again when the cause is gone.",
            }
        return result

    def _command(self, command: str) -> list[str | bytes]:
        """Return what runs ``command`` on the worker, as who the task says, with our stdin."""
        connection = self._connection
        become = connection.become
        if become and self.get_become_option("become_user") != self._get_remote_user():
            if become.get_option("become_pass"):
                raise AnsibleActionFail(
                    f"{become.name} wants a password on this worker, and a stream cannot give it. "
                    "Let it want none, or bring the image with image_source=build or registry."
                )
            command = become.build_become_command(command, connection._shell)
        if connection.transport == "local":
            return ["/bin/sh", "-c", command]
        if connection.transport == "ssh":
            ssh = connection.get_option("ssh_executable")
            return connection._build_command(ssh, "ssh", connection.host, command)
        raise AnsibleActionFail(
            f"An image can be shipped over ssh, not over {connection.transport}. "
            "Bring it with image_source=build or registry."
        )

    def _follow(
        self, process: subprocess.Popen[bytes], archive: BinaryIO, host: str
    ) -> tuple[int, int]:
        """Show now and then how far it is, until it ends; return how much was sent, and of what."""
        started, size = time.monotonic(), os.fstat(archive.fileno()).st_size
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SHOW_SECONDS)
            # The process reads through the same open file, so its position is ours.
            sent = os.lseek(archive.fileno(), 0, os.SEEK_CUR)
            if process.returncode is not None:
                return sent, size
            line = progress(time.monotonic() - started, sent, size)
            display.display(f"  [{host}] {line}")
