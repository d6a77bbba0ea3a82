"""What can go wrong with every server of these tests."""

from __future__ import annotations

from dataclasses import dataclass, field

ALWAYS = 1_000_000


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that match ``where``, a regular expression.

    A request is its method, its path, and the range if it wants one: GET /a/b bytes=5-.

    With ``after`` the connection breaks off after so many bytes of the body, with ``wrong`` the
    body's last byte is another one; else ``status`` is the answer, with ``headers`` and
    ``message``, and with a status of None nothing ever is.
    """

    where: str
    status: int | None = 503
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "a bad day"
    after: int | None = None
    wrong: bool = False
    times: int = 1

    @property
    def spoils_the_body(self) -> bool:
        """Whether the answer is the right one, but for its body."""
        return self.after is not None or self.wrong

    def spoil(self, body: bytes) -> bytes:
        """Return what arrives of a body."""
        if self.wrong and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        return body[: self.after]
