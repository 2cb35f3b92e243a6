"""From a hub id to a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from billhook.models.adapter import CONFIG, FOLDER, WEIGHTS
from billhook.plan.errors import InputError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors", "LICENSE*", "NOTICE*"]
_UNWANTED = ["*/*", "model.*.safetensors"]  # other formats in subfolders, other precisions


def plausible(source: str) -> bool:
    """Could this be the name of a model on the hub (NAME or OWNER/NAME)?"""
    return bool(_ID.fullmatch(source))


def fetch(source: str, code: bool = False) -> Path:
    """Download what a model needs to be loaded (safetensors, JSON, tokenizer, its paths; Python files only with
    ``code``) into the hub's own cache and return the folder there. InputError if it does not exist, is closed or cannot
    be reached."""
    wanted = [*_WANTED, *(["*.py"] if code else [])]
    try:
        # apart from the rest, which leaves out all subfolders
        snapshot_download(source, allow_patterns=[f"{FOLDER}/{CONFIG}", f"{FOLDER}/{WEIGHTS}"])
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise InputError(f"model {source} on the hub is gated: accept its terms there and log in") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"model {source} is neither a local folder nor on the hub; {USAGE}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"model {source} is not a local folder, and the hub cannot be reached ({type(error).__name__}); {USAGE}"
        ) from error


USAGE = "a model is a folder, a .gguf file, a hub id such as OWNER/NAME, or demo"
