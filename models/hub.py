"""The model hub: what is reachable or cached, with its failures turned into sentences.

In: a repository name and the settings key that gave it. Out: nothing if it is available, the cached snapshot, or a
ModelError that names the key.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import ModelError

TIMEOUT_SECONDS = 5.0
_TRANSPORT = ("httpx", "httpx2", "httpcore", "httpcore2")


def check_hub(repository: str, key: str, revision: str | None = None) -> None:
    """Raises ModelError if the hub repository is neither cached here nor reachable."""
    from huggingface_hub import HfApi, constants

    if cached_snapshot(repository) is not None:
        return
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{key}: {repository} is not in the local hub cache and HF_HUB_OFFLINE is set")
    with hub_errors(key, repository):
        HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_SECONDS)


def cached_snapshot(repository: str) -> Path | None:
    """The newest downloaded snapshot of a model repository (possibly only some of its files), or None."""
    from huggingface_hub import constants

    # Found by name, as the cache lays it out: scanning a large cache for one repository takes seconds.
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    snapshots = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def snapshot_of(repository: str, revision: str | None = None) -> Path | None:
    """The downloaded snapshot of a revision (a branch, a tag or a commit; None: main), or None."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    named = folder / "refs" / (revision or "main")
    commit = named.read_text().strip() if named.is_file() else revision
    snapshot = folder / "snapshots" / commit if commit else None
    return snapshot if snapshot is not None and snapshot.is_dir() else None


@contextmanager
def hub_errors(key: str, repository: str) -> Iterator[None]:
    """Turns what the hub client raises into a ModelError; EntryNotFoundError from a reachable hub passes through."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise ModelError(
            f"{key}: {repository} is gated; accept its licence on the hub and set HF_TOKEN (see SETUP.md, Gemma)"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"{key}: the hub has no repository {repository} that this token can see") from None
    except RevisionNotFoundError:
        raise ModelError(f"{key}: the hub repository {repository} has no such revision") from None
    except HFValidationError as error:
        raise ModelError(f"{key}: {repository!r} is not a hub repository name: {error}") from None
    except LocalEntryNotFoundError as error:
        raise _unreachable(key, repository, error) from None
    except EntryNotFoundError:
        raise
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(key, repository, error) from None
    except Exception as error:  # the client does not wrap the errors of its HTTP library
        if type(error).__module__.partition(".")[0] not in _TRANSPORT:
            raise
        raise _unreachable(key, repository, error) from None


def _unreachable(key: str, repository: str, error: Exception) -> ModelError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return ModelError(
        f"{key}: {repository} is not on this machine and could not be fetched from the hub ({reason}); "
        "go online, or give a local folder"
    )
