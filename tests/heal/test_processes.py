"""Two processes that train together give what one gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heal.training_bed import quick, run
from safetensors.torch import load_file

from billhook.plan.record import TrainingRecord

TESTS = Path(__file__).resolve().parent.parent
METHODS = ("distill", "lisa")

SHARE = """
import os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from heal.training_bed import quick, run

torch.set_num_threads(1)
place = Path(sys.argv[1])
for method in sys.argv[2:]:
    _, healing, record = run("llama", quick(method, rate=3e-3), place / f"{method}-state")
    name = f"{method}-{PartialState().process_index}-of-{PartialState().num_processes}"
    save_file(dict(healing.tensors), place / f"{name}.safetensors")
    (place / f"{name}.json").write_text(record.model_dump_json())
PartialState().destroy_process_group()
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    """With the environment that accelerate launch and torchrun give them, over gloo."""
    script = tmp_path / "share.py"
    script.write_text(SHARE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    pair = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), *METHODS],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    alone = {method: run("llama", quick(method, rate=3e-3), tmp_path / method)[1:] for method in METHODS}
    for process in pair:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-3000:]
    for method, (healing, record) in alone.items():
        first, second = (load_file(tmp_path / f"{method}-{rank}-of-2.safetensors") for rank in (0, 1))
        assert healing.tensors.keys() == first.keys() == second.keys() != set()
        for name, tensor in healing.tensors.items():
            torch.testing.assert_close(first[name], tensor, atol=1e-3, rtol=1e-3)
            assert torch.equal(first[name], second[name])
        curve = TrainingRecord.model_validate_json((tmp_path / f"{method}-0-of-2.json").read_text()).curve
        assert [look.held for look in curve] == pytest.approx([look.held for look in record.curve], rel=1e-3)
        assert [look.loss for look in curve[1:]] == pytest.approx([look.loss for look in record.curve[1:]], rel=1e-3)
        assert record.curve[-1].held < record.curve[0].held
