"""Ask the Hugging Face hub about a token, on the controller, before any worker gets it.

The token is read from the variable ``huggingface__token``. It is no argument of the task and no
part of its result, so that the task needs no ``no_log`` and its words reach the user.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import httpx2
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

ATTEMPTS = 4
ANSWER_SECONDS = 10
LONGEST_WAIT_SECONDS = 60

Answer = TypeVar("Answer")

display = Display()


class Refused(Exception):
    """The token must not be stored; the message says why, and what to do about it."""


def ask(endpoint: str, question: Callable[[], Answer]) -> Answer:
    """Return the hub's answer, asking up to ATTEMPTS times while it is not there or busy.

    Raises HfHubHTTPError for an answer that another attempt would not change, else Refused.
    """
    # Each process has a session of its own, and huggingface_hub's waits forever.
    get_session().timeout = ANSWER_SECONDS
    for attempt in range(ATTEMPTS):
        wait = 2**attempt
        try:
            return question()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status != 429 and status < 500:
                raise
            trouble = f"answers {status}"
            asked_for = error.response.headers.get("Retry-After", "")
            wait = min(int(asked_for), LONGEST_WAIT_SECONDS) if asked_for.isdigit() else wait
        except (httpx2.RequestError, OSError) as error:
            trouble = f"is unreachable ({str(error) or type(error).__name__})"
        if attempt < ATTEMPTS - 1:
            display.display(f"The Hugging Face hub at {endpoint} {trouble}; again in {wait} s")
            time.sleep(wait)
    raise Refused(
        f"The Hugging Face hub at {endpoint} {trouble}, {ATTEMPTS} times. See that the controller "
        "reaches it, or set HF_ENDPOINT to a hub that it does reach; without a token none is asked."
    )


def check_endpoint(endpoint: str) -> None:
    """Raise Refused if ``endpoint`` is no address of a hub."""
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL:
        url = httpx2.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise Refused(
            f"The Hugging Face hub's address (HF_ENDPOINT) is {endpoint!r}; allowed is http:// or "
            "https:// and a host. Correct it, or unset it to take the public hub."
        )


def owner(api: HfApi, source: str) -> str:
    """Return the name of the user whose token it is. Raises Refused if the hub does not take it."""
    try:
        return ask(api.endpoint, api.whoami)["name"]
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            said = error.response.headers.get("X-Error-Message", "") + error.response.text
            raise Refused(
                f"The Hugging Face token in {source} is "
                f"{'expired' if 'expired' in said else 'wrong'}: {api.endpoint} does not take it. "
                f"Make another one at {api.endpoint}/settings/tokens and put it there."
            ) from error
        said = f"answers {error.response.status_code}"
    except (ValueError, KeyError, TypeError):
        said = "gives no name"
    raise Refused(
        f"{api.endpoint} {said} when it is asked whose the token in {source} is; a Hugging Face "
        "hub would say. Set HF_ENDPOINT to one, or unset it to take the public hub."
    )


def unreadable(
    api: HfApi, user: str, source: str, repositories: Mapping[str, list[str]]
) -> Iterator[str]:
    """Yield a complaint about each of the ``repositories`` that the token may not read.

    They stand under their type, ``model`` or ``dataset``. What cannot be the name of one is a path,
    which nobody needs a token for. Raises Refused if the hub does not answer.
    """
    tokens = f"{api.endpoint}/settings/tokens"
    for kind, names in repositories.items():
        for name in filter(is_repository, names):
            page = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
            token = f"The Hugging Face token in {source} (user {user})"
            try:
                ask(api.endpoint, partial(api.auth_check, name, repo_type=kind))
            except GatedRepoError:
                yield (
                    f"{token} is unauthorised for the gated {kind} {name}. Ask for access at "
                    f"{page}; a fine-grained token must also be allowed, at {tokens}, to read "
                    "gated repositories."
                )
            except RepositoryNotFoundError:
                yield (
                    f"{token} sees no {kind} {name}: there is none, or it is private and the token "
                    f"unauthorised. Correct the name, or get access at {page}."
                )
            except HfHubHTTPError as error:
                status = error.response.status_code
                cannot = "is unauthorised for" if status in (401, 403) else "cannot read"
                yield (
                    f"{token} {cannot} the {kind} {name}: {api.endpoint} answers {status}. Look at "
                    f"{page}, and at {tokens} for what the token may do."
                )


def is_repository(name: str) -> bool:
    """Tell whether ``name`` can be that of a repository on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class ActionModule(ActionBase):
    """``check_hub_token``: see roles/huggingface/tasks/main.yml for its arguments."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("datasets", "endpoint", "models"))

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the token's ``user``, none without a token. Fail with all that is against it."""
        super().run(tmp, task_vars)
        args = self._task.args
        token = self._templar.template(task_vars["huggingface__token"])
        if not token["value"]:
            return {"changed": False, "user": None}
        # Else huggingface_hub also asks the public hub whether its user may be a coding agent.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        api = HfApi(endpoint=args["endpoint"] or None, token=token["value"])
        repositories = {"model": args["models"], "dataset": args["datasets"]}
        try:
            check_endpoint(api.endpoint)
            user = owner(api, token["source"])
            complaints = list(unreadable(api, user, token["source"], repositories))
        except Refused as refused:
            complaints = [str(refused)]
        if complaints:
            # Whatever an answer may have held: the token is in no text.
            message = "\n".join(complaints).replace(token["value"], "…")
            return {"failed": True, "msg": f"{message}\nNo worker has got the token."}
        return {"changed": False, "user": user}
