"""The walks under a real ``accelerate launch``: two processes cut and heal one model, and one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from billhook.plan import processes
from billhook.plan.errors import InputError
from billhook.plan.record import Run
from billhook.recipes import training
from billhook.recipes.compress import compress
from billhook.recipes.heal import heal
from billhook.recipes.opened import opened
from billhook.recipes.workplace import workplace
from billhook.surgery.reopen import load

LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
SHARDED = [*LAUNCH, "--use_fsdp", "--fsdp_version", "2", "--mixed_precision", "no", "--main_process_port", "0"]

SCRIPT = """
import os, sys
from billhook.data import calibrate
from billhook.recipes import compress, proof, texts, training
from billhook.cli import app
if os.environ["RANK"] == "1":
    calibrate.written = training.divergences = None  # text is written, and the better beginning found, by the first
training.TRAINING_LENGTH = texts.CALIBRATION_LENGTH = proof.EVALUATION_LENGTH = 64
texts.CALIBRATION_TOKENS = compress.TRAINING_TOKENS = texts.HEALING_TOKENS = 1024
proof.EVALUATION_TOKENS = 512
proof.bench = proof.probes = lambda *_, **__: ()
app(sys.argv[1:])
"""

EACH = """
from accelerate import PartialState
for line in sys.argv[1:]:
    app([*line.split(), "--max-new-tokens", "2"], standalone_mode=False)
    PartialState().wait_for_everyone()  # until the first has written
"""


def test_cut_and_healed_by_two(tiny_lm: Path, tmp_path: Path) -> None:
    """The first writes the text, searches and says where training begins, both train, the first proves, writes and
    prints."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    asked = f"compress {tiny_lm} --recipe block-influence --budget blocks=4 --heal lora --calibration self --out {out}"
    done = subprocess.run(
        [sys.executable, *SHARDED, str(script), *asked.split(), "--max-new-tokens", "2", "--json"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]) == 1
    run = Run.model_validate_json((out / "billhook.json").read_text())
    assert run.healing is not None and run.healing.training is not None
    record = run.healing.training
    assert (record.trains, run.healing.method) == ("lora", "lora") and record.curve[-1].step > 0
    assert run.evidence and len(load(out).model.model.layers) == 4
    assert not workplace(out).exists()


def test_refitted_by_two(tiny_lm: Path, tmp_path: Path) -> None:
    """Both refit, after the first searched and when it is all that is done; the first judges and writes."""
    script, first, second = (tmp_path / name for name in ("script.py", "first", "second"))
    script.write_text(SCRIPT.replace("app(sys.argv[1:])", EACH))
    asked = [
        f"compress {tiny_lm} --recipe block-influence --budget blocks=4 --heal closed-form --out {first}",
        f"heal {first} --method closed-form --seed 1 --out {second}",
    ]
    done = subprocess.run(
        [sys.executable, *SHARDED, str(script), *asked],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for out in (first, second):
        run = Run.model_validate_json((out / "billhook.json").read_text())
        assert run.healing is not None and run.healing.method == "closed-form" and run.healing.refits
        assert run.healing.tokens == 1024 and len(load(out).model.model.layers) == 4
        assert run.evidence and not workplace(out).exists()


def test_processes_on_several_devices_share_what_is_kept(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each has a device of its own."""
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    known = training._of(model)
    monkeypatch.setattr(training, "environment", lambda _: {**known[1], "device": "cpu:1"})
    assert training._of(model) == known
    assert [processes.local(device) for device in ("cuda", "cpu")] == ["cuda", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("RANK", "3")
    assert processes.local("cuda") == "cuda" and processes.is_first(), "one process is alone, whatever else is set"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not processes.is_first()
    assert [processes.local(device) for device in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_what_several_cannot_share_is_refused(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for walk in (partial(compress, budget="params=0.8", heal="scales"), partial(heal, method="scales")):
        with pytest.raises(InputError, match="by training or in closed form, which scales is not; start one"):
            walk(tiny_lm, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not workplace(tmp_path / "out").exists()
