"""Names on the Hugging Face hub, and errors of loading from there in words on what to do.

huggingface_hub, datasets and transformers are imported inside the functions, because they exist
only where the trainer runs, not on the controller.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .flags import BadInput

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def full_name(dataset: str) -> str:
    """Return a dataset's full name on the hub, such as Salesforce/wikitext for wikitext.

    The hub redirects from old names, but the library datasets does not follow everywhere.
    """
    if "/" in dataset or Path(dataset).is_dir():
        return dataset

    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    # As HfApi.dataset_info, but with retries while the hub is busy.
    response = http_backoff(
        "GET",
        f"{constants.ENDPOINT}/api/datasets/{dataset}",
        headers=build_hf_headers(),
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    hf_raise_for_status(response)
    return response.json()["id"]


@contextmanager
def loading(kind: str, name: str, check: str, otherwise: str) -> Iterator[None]:
    """Turn the errors of loading ``kind`` ``name`` in this context into BadInput with a remedy.

    The message contains ``check``, what to check, where the hub is not the cause, and
    ``otherwise``, how to do without the hub. The libraries have already retried a hub that is busy
    or unreachable.
    """
    import httpx2
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from huggingface_hub import constants

    # Network errors of huggingface_hub, and of the client of its storage
    unreached = (httpx2.TransportError, ConnectionError, TimeoutError)
    try:
        yield
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError, DatasetsError) as error:
        if refusal := _refusal(name, error):
            reason = _meaning(kind, name, refusal)
        elif lost := [cause for cause in _causes(error) if isinstance(cause, unreached)]:
            reason = (
                f"{constants.ENDPOINT} was not reached, or it broke off ({lost[0]}). Check this "
                "machine's network, proxy and certificates, and start again"
            )
        else:
            # DatasetGenerationError itself says nothing; its cause does. The message is one line,
            # so that it is the last line of the log.
            why = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            reason = f"{check}: {' '.join(str(why).split())}"
        raise BadInput(f"{kind} {name!r} cannot be loaded; {reason} ({otherwise})") from error


def _refusal(name: str, error: Exception) -> HfHubHTTPError | None:
    """Return the HTTP error of the hub that caused ``error``; None if there is none."""
    import httpx2
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause
    if isinstance(error, DatasetNotFoundError):
        # The error has lost the hub's answer: ask again.
        try:
            HfApi().auth_check(name, repo_type="dataset")
        except HfHubHTTPError as refusal:
            return refusal
        except httpx2.TransportError:
            pass
    return None


def _meaning(kind: str, name: str, refusal: HfHubHTTPError) -> str:
    """Return what the HTTP error of the hub means, and what to do about it."""
    from huggingface_hub import constants, get_token

    hub, status = constants.ENDPOINT, refusal.response.status_code
    page = f"{hub}/{'datasets/' if kind == 'dataset' else ''}{name}"
    tokens = f"a token at {hub}/settings/tokens, and log in with it (HF_TOKEN, role huggingface)"
    if status == 401 and get_token():
        return f"{hub} does not take the token (401), which is wrong or has expired. Get {tokens}"
    if status == 401:
        return (
            f"{hub} requires a login (401), and this worker is not logged in. Check the name, get "
            f"access at {page} and {tokens}"
        )
    if status == 403:
        return (
            f"{hub} denies access to the owner of the token (403). Ask for access at {page}; a "
            "fine-grained token also needs the permission to read gated repositories"
        )
    if status == 404:
        return f"{hub} has none of that name, or it is private (404). Check the name"
    if status == 429:
        seconds = refusal.response.headers.get("Retry-After")
        return (
            f"{hub} was asked too often (429). Wait {f'{seconds} s' if seconds else 'a while'} and "
            "start again; with a login its limit is higher"
        )
    return f"{hub} answers {status}. Look at {page}, and start again"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then its cause, the cause of that, and so on."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
