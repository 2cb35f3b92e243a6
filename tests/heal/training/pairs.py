"""Two processes that train together over gloo, with the environment that accelerate launch gives them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def environments(**more: str) -> list[dict[str, str]]:
    """Of the two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}
    shared["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return [{**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def begun(command: Sequence[str], **more: str) -> list[subprocess.Popen[str]]:
    """Both, under way."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([sys.executable, *command], env=env, **pipes) for env in environments(**more)]


def sharing(place: Path, jobs: list[dict[str, Any]], **more: str) -> list[subprocess.Popen[str]]:
    """Both at work on these jobs (see ``share``)."""
    return begun(["-m", "heal.training.share", str(place), json.dumps(jobs)], **more)


def ended(pair: list[subprocess.Popen[str]]) -> list[str]:
    """What both wrote to standard output, when they have ended well."""
    written = []
    for process in pair:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        written.append(output)
    return written


def killed(pair: list[subprocess.Popen[str]]) -> None:
    """When one has killed itself the other is killed too, as a launcher does; it may have failed by then for want of
    its peer."""
    while all(process.poll() is None for process in pair):
        time.sleep(0.05)
    for process in pair:
        process.kill()
    said = [process.communicate(timeout=600)[1][-3000:] for process in pair]
    codes = [process.returncode for process in pair]
    assert -signal.SIGKILL in codes and 0 not in codes, said
