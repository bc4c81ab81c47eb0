"""Models on the Hugging Face hub. Who one is there (tokens, endpoints) is huggingface_hub's business."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from alula.errors import AlulaError
from alula.exporting.export import directory_of, export_model, host_of


def push_model(
    source: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload a model directory as one commit, made whole first (`export_model`): a host, or an adapter with its host.

    Args:
        source: directory of a model or an adapter.
        repository: ``OWNER/NAME``; made where it is not there yet.
        private: of a repository that is made.
        revision: branch; the main one by default.
        message: of the commit.
        api: huggingface_hub's client; by default one that goes by its own environment variables and stored login.

    Returns:
        the address of the commit.

    Raises:
        UsageError, HostError: no model. AlulaError: the hub refuses, or cannot be reached.
    """
    path = directory_of(source)
    api = HfApi() if api is None else api
    with contextlib.ExitStack() as stack:
        if host_of(path) is not None:  # its host is to come along
            workplace = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".push-"))
            path = export_model(path, Path(workplace) / "model")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository,
                folder_path=path,
                revision=revision,
                commit_message=message or f"Upload {Path(source).name} with alula",
                ignore_patterns=[".*"],
            )
        except LocalTokenNotFoundError as error:
            raise AlulaError("you are not logged in", where=repository, remedy="hf auth login") from error
        except OfflineModeIsEnabled as error:
            raise AlulaError(
                "the hub is not to be reached: offline mode", where=repository, remedy="unset HF_HUB_OFFLINE"
            ) from error
        except (HfHubHTTPError, HFValidationError) as error:
            said = " ".join(str(error).split())[:300]
            remedy = "hf auth login with a token that may write there, and name it OWNER/NAME"
            raise AlulaError(f"the hub refuses: {said}", where=repository, remedy=remedy) from error
        except (OSError, HTTPError) as error:
            raise AlulaError(
                f"the hub cannot be reached ({error})", where=repository, remedy="check the connection, and HF_ENDPOINT"
            ) from error
    return str(done.commit_url)
