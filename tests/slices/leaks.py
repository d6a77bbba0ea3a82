"""Where a secret is: in the processes of this machine while something runs, and in files."""

import base64
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

LOOK_SECONDS = 0.1
PIECE = 1 << 24


def forms(secret: str) -> list[bytes]:
    """Return the secret as it is, and as it is somewhere in a text that base64 has packed."""
    packed = [secret.encode()]
    for before in range(3):
        whole = base64.b64encode(bytes(before) + secret.encode())
        # Without the characters that hold bits of its neighbours
        packed.append(whole[(0, 2, 3)[before] : (before + len(secret)) * 8 // 6])
    return packed


class Watch:
    """Looks at every process's command line and environment, those in containers included.

    ``sights`` are the places and the command lines of those that show one of the secrets; who lives
    for less than LOOK_SECONDS may go unseen. ``looked_into`` are the command lines of all whose
    environment could be read. A process that ``may_know`` may have a secret in its own.
    """

    def __init__(
        self, secrets: Iterable[str], may_know: Callable[[int, str], bool] = lambda *_: False
    ) -> None:
        self.sights: set[tuple[str, str]] = set()
        self.looked_into: set[str] = set()
        self._words = [form for secret in secrets for form in forms(secret)]
        self._may_know = may_know
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watch":
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                # Some have gone by now.
                with suppress(OSError):
                    self._look(int(pid))

    def _look(self, pid: int) -> None:
        words, environment = (_read(f"/proc/{pid}/{name}") for name in ("cmdline", "environ"))
        command = words.replace(b"\0", b" ").decode(errors="replace").strip()
        if environment:
            self.looked_into.add(command)
        if self._shows(words):
            self.sights.add(("cmdline", command))
        if self._shows(environment) and not self._may_know(pid, command):
            self.sights.add(("environ", command))

    def _shows(self, content: bytes) -> bool:
        return any(word in content for word in self._words)


def in_text(secrets: Iterable[str], text: str) -> bool:
    """Tell whether a text holds one of the secrets."""
    return any(form in text.encode() for secret in secrets for form in forms(secret))


def in_files(secrets: Iterable[str], root: Path, *without: str) -> set[str]:
    """Return the files below ``root`` that hold one of the secrets, by their paths from there.

    Directories of the paths ``without`` are left out, and so is what is no regular file.
    """
    words = [form for secret in secrets for form in forms(secret)]
    longest = max(map(len, words))
    found = set()
    for directory, names, files in os.walk(root):
        here = Path("/", os.path.relpath(directory, root))
        names[:] = [name for name in names if str(here / name) not in without]
        for name in files:
            path = Path(directory, name)
            # Some have gone by now.
            with suppress(OSError):
                if path.is_file() and not path.is_symlink() and _holds(path, words, longest):
                    found.add(str(here / name))
    return found


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _holds(path: Path, words: list[bytes], longest: int) -> bool:
    end = b""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            if any(word in end + piece for word in words):
                return True
            end = piece[-longest:]
    return False
