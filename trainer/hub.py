"""What comes from the Hugging Face hub: its present name, and what to do where it does not come.

huggingface_hub, datasets and transformers exist only in the trainer's image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.flags import BadInput

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def full_name(dataset: str) -> str:
    """Return what a dataset is called on the hub: wikitext has become Salesforce/wikitext.

    The hub leads from the old name to the new one, but datasets goes only half of that way.
    """
    if "/" in dataset or Path(dataset).is_dir():
        return dataset

    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    # As HfApi.dataset_info, except that it asks again where the hub is busy.
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
    """Raise BadInput for what the libraries raise when they cannot load, in words on what to do.

    ``check`` says what to check where it is not the hub's doing, ``otherwise`` how to do without.
    A hub that is busy or broke off has been asked several times by then.
    """
    import httpx2
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from huggingface_hub import constants

    # Of huggingface_hub and of the storage's own client
    unreached = (httpx2.TransportError, ConnectionError, TimeoutError)
    try:
        yield
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError, DatasetsError) as error:
        if refusal := _refusal(name, error):
            reason = _meaning(kind, name, refusal)
        elif lost := [it for it in _causes(error) if isinstance(it, unreached)]:
            reason = (
                f"{constants.ENDPOINT} was not reached, or it broke off ({lost[0]}). See that this "
                "machine reaches it, also through its proxy and with its certificates, and start "
                "again"
            )
        else:
            # Generating says nothing by itself. In one line, which is the last of a log
            why = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            reason = f"{check}: {' '.join(str(why).split())}"
        raise BadInput(f"{kind} {name!r} cannot be loaded; {reason} ({otherwise})") from error


def _refusal(name: str, error: Exception) -> HfHubHTTPError | None:
    """Return the hub's answer behind an error, None where there is none."""
    import httpx2
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause
    if isinstance(error, DatasetNotFoundError):
        # It does not know any more which answer it comes from.
        try:
            HfApi().auth_check(name, repo_type="dataset")
        except HfHubHTTPError as refusal:
            return refusal
        except httpx2.TransportError:
            pass
    return None


def _meaning(kind: str, name: str, refusal: HfHubHTTPError) -> str:
    """Say what the hub's answer means, and what to do about it."""
    from huggingface_hub import constants, get_token

    hub, status = constants.ENDPOINT, refusal.response.status_code
    page = f"{hub}/{'datasets/' if kind == 'dataset' else ''}{name}"
    tokens = f"a token at {hub}/settings/tokens, and log in with it (HF_TOKEN, role huggingface)"
    if status == 401 and get_token():
        return f"{hub} does not take the token (401), which is wrong or has expired. Get {tokens}"
    if status == 401:
        return (
            f"{hub} does not show it to just anybody (401), and this worker is not logged in. "
            f"Check the name, get access at {page} and {tokens}"
        )
    if status == 403:
        return (
            f"{hub} does not show it to the owner of the token (403). Ask for access at {page}; a "
            "fine-grained token must also be allowed to read gated repositories"
        )
    if status == 404:
        return f"{hub} has none of that name, or it is private (404). Check the name"
    if status == 429:
        seconds = refusal.response.headers.get("Retry-After")
        return (
            f"{hub} was asked too often (429). Wait {f'{seconds} s' if seconds else 'a while'} and "
            "start again; who is logged in may ask more often"
        )
    return f"{hub} answers {status}. Look at {page}, and start again"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
