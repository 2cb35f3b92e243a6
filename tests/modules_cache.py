"""Where transformers puts the remote code of the checkpoints that tests load: away from the user's own cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

CACHE = Path(tempfile.gettempdir()) / f"billhook-modules-{os.getpid()}"  # one a process: Python remembers the place


@pytest.fixture(scope="module", autouse=True)
def modules_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(CACHE))
        yield
    shutil.rmtree(CACHE, ignore_errors=True)
