"""Check a token with the Hugging Face hub, on the controller, before it is sent to any worker.

The token is read from the variable ``huggingface__token``. It is neither an argument of the task
nor part of its result, so the task needs no ``no_log`` and its errors reach the user.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import httpx2
from ansible.plugins.action import ActionBase
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

from ..plugin_utils.screen import show

ATTEMPTS = 4
ANSWER_SECONDS = 10
LONGEST_WAIT_SECONDS = 60

Answer = TypeVar("Answer")


class TokenError(Exception):
    """The token must not be stored; the message is the cause and the next step."""


def request(endpoint: str, call: Callable[[], Answer]) -> Answer:
    """Return what ``call`` gets from the hub, with up to ATTEMPTS attempts.

    Raises HfHubHTTPError for an answer that another attempt would not change, and TokenError if the
    hub stays unreachable or busy.
    """
    # Each process has a session of its own, and huggingface_hub sets no timeout for it.
    get_session().timeout = ANSWER_SECONDS
    for attempt in range(ATTEMPTS):
        wait = 2**attempt
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status != 429 and status < 500:
                raise
            problem = f"answers {status}"
            retry_after = error.response.headers.get("Retry-After", "")
            wait = min(int(retry_after), LONGEST_WAIT_SECONDS) if retry_after.isdigit() else wait
        except (httpx2.RequestError, OSError) as error:
            problem = f"is unreachable ({str(error) or type(error).__name__})"
        if attempt < ATTEMPTS - 1:
            show(f"The Hugging Face hub at {endpoint} {problem}; next attempt in {wait} s")
            time.sleep(wait)
    raise TokenError(
        f"The Hugging Face hub at {endpoint} {problem}, in {ATTEMPTS} attempts. Check that the "
        "controller reaches the hub, set HF_ENDPOINT to another hub, or go on without a token."
    )


def check_endpoint(endpoint: str) -> None:
    """Raise TokenError unless ``endpoint`` can be the address of a hub."""
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL:
        url = httpx2.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise TokenError(
            f"The Hugging Face hub's address (HF_ENDPOINT) is {endpoint!r}; allowed is http:// or "
            "https:// and a host. Correct it, or unset it to take the public hub."
        )


def owner(api: HfApi, source: str) -> str:
    """Return the name of the user whom the token of ``api`` belongs to.

    ``source`` says where the token was found. Raises TokenError if the hub does not accept it.
    """
    try:
        return request(api.endpoint, api.whoami)["name"]
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            answer = error.response.headers.get("X-Error-Message", "") + error.response.text
            raise TokenError(
                f"The Hugging Face token in {source} is "
                f"{'expired' if 'expired' in answer else 'wrong'}: {api.endpoint} does not accept "
                f"it. Create another one at {api.endpoint}/settings/tokens, and store it in "
                f"{source}."
            ) from error
        problem = f"answers {error.response.status_code}"
    except (ValueError, KeyError, TypeError):
        problem = "returns no name"
    raise TokenError(
        f"{api.endpoint} {problem} to the question whom the token in {source} belongs to, which "
        "every Hugging Face hub answers. Set HF_ENDPOINT to a hub, or unset it to use the public "
        "hub."
    )


def unreadable(
    api: HfApi, user: str, source: str, repositories: Mapping[str, list[str]]
) -> Iterator[str]:
    """Yield an error for each of the ``repositories`` that the token may not read.

    ``repositories`` has lists of names under ``model`` and ``dataset``. A name that the hub does
    not allow is a local path, and is passed over. Raises TokenError if the hub does not answer.
    """
    tokens = f"{api.endpoint}/settings/tokens"
    for kind, names in repositories.items():
        for name in filter(is_repository, names):
            page = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
            token = f"The Hugging Face token in {source} (user {user})"
            try:
                request(api.endpoint, partial(api.auth_check, name, repo_type=kind))
            except GatedRepoError:
                yield (
                    f"{token} is unauthorised for the gated {kind} {name}. Request access at "
                    f"{page}; a fine-grained token must also be allowed, at {tokens}, to read "
                    "gated repositories."
                )
            except RepositoryNotFoundError:
                yield (
                    f"{token} cannot find the {kind} {name}: either it does not exist, or it is "
                    "private and the token unauthorised. Correct the name, or get access at "
                    f"{page}."
                )
            except HfHubHTTPError as error:
                status = error.response.status_code
                reason = "is unauthorised for" if status in (401, 403) else "cannot read"
                yield (
                    f"{token} {reason} the {kind} {name}: {api.endpoint} answers {status}. Check "
                    f"{page}, and the token's permissions at {tokens}."
                )


def is_repository(name: str) -> bool:
    """Return whether the hub allows ``name`` as that of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class ActionModule(ActionBase):
    """The action ``check_hub_token``; its documentation is in plugins/modules."""

    _requires_connection = False
    _supports_check_mode = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the token's ``user``, None without a token; fail with everything it may not do."""
        super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "endpoint": {"type": "str", "default": ""},
                "models": {"type": "list", "elements": "str", "default": []},
                "datasets": {"type": "list", "elements": "str", "default": []},
            }
        )
        token = self._templar.template(task_vars["huggingface__token"])
        if not token["value"]:
            return {"changed": False, "user": None}
        # Otherwise huggingface_hub sends a further request, with telemetry, to the public hub.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        api = HfApi(endpoint=args["endpoint"] or None, token=token["value"])
        repositories = {"model": args["models"], "dataset": args["datasets"]}
        try:
            check_endpoint(api.endpoint)
            user = owner(api, token["source"])
            errors = list(unreadable(api, user, token["source"], repositories))
        except TokenError as error:
            errors = [str(error)]
        if errors:
            # An answer of the hub may quote the token.
            message = "\n".join(errors).replace(token["value"], "…")
            return {"failed": True, "msg": f"{message}\nThe token was not sent to any worker."}
        return {"changed": False, "user": user}
