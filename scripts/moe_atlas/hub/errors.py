"""What the Hub's client raises, as a sentence with the page or the command to go to."""

import contextlib
import errno
import os
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from moe_atlas.errors import AtlasError, first_line


def token() -> str | bool:
    """The token of the environment (HF_TOKEN), or False: none is sent, not even one that a login has stored."""
    return os.environ.get("HF_TOKEN") or False


def page(repository: str, path: str = "") -> str:
    """Address of a page of the repository."""
    return "/".join(filter(None, (constants.ENDPOINT, repository, path)))


@contextlib.contextmanager
def hub_errors(repository: str, revision: str, kind: str = "model") -> Iterator[None]:
    """Turn what the Hub's client raises inside the block into an AtlasError of one sentence.

    `kind` is model or dataset, which have pages at different addresses.
    """
    source = f"hf:{repository}"
    address = repository if kind == "model" else f"{kind}s/{repository}"
    known = "the token in HF_TOKEN" if token() else "no token (HF_TOKEN is not set)"
    try:
        yield
    except GatedRepoError:
        raise AtlasError(
            f"{source}: the repository is gated and was asked for with {known}; accept its terms on "
            f"{page(address)}, set HF_TOKEN to a token of that account from {page('settings/tokens')}, and run again."
        ) from None
    except RevisionNotFoundError:
        raise AtlasError(
            f"{source}: there is no revision {revision}; take a commit from {page(address, 'commits/main')} "
            "and write it into the row."
        ) from None
    except RepositoryNotFoundError:
        raise AtlasError(
            f"{source}: there is no such repository, or it is private, and it was asked for with {known}; correct the "
            f"source of the row, or set HF_TOKEN to a token that may read {page(address)}."
        ) from None
    except HFValidationError as error:
        raise AtlasError(f"{source}: this is no name of a repository ({first_line(error)}); correct the row.") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            _refuse(source, cause)
        raise AtlasError(
            f"{source}: the Hub at {constants.ENDPOINT} cannot be reached or broke off ({first_line(cause)}); "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE and run again: finished files are kept."
        ) from None
    except EntryNotFoundError as error:
        raise AtlasError(
            f"{source}: a file is missing at revision {revision} ({first_line(error)}); take another commit from "
            f"{page(address, 'commits/main')}."
        ) from None
    except HfHubHTTPError as error:
        _refuse(source, error)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise AtlasError(
                f"{source}: the disk that holds {constants.HF_HUB_CACHE} is full; free space, or set HF_HOME to a "
                "folder on a larger disk, and run again: finished files are kept."
            ) from None
        if "Consistency check failed" in str(error):
            raise AtlasError(
                f"{source}: a file came with another size than the Hub says ({first_line(error)}); run again."
            ) from None
        raise


def _refuse(source: str, error: HfHubHTTPError) -> None:
    status = error.response.status_code if error.response is not None else "an error"
    mend = "set HF_TOKEN to a valid token" if status in (401, 403) else "wait and run again: finished files are kept"
    raise AtlasError(f"{source}: the Hub at {constants.ENDPOINT} answered {status}; {mend}.") from None
