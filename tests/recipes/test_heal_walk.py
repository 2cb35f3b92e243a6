"""``heal``: a cut model goes in, a better one comes out, killed or not; what cannot be is one line."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from billhook.data import Windows
from billhook.heal import Healing
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Run
from billhook.recipes import heal as walk
from billhook.recipes import proof, texts, training
from billhook.recipes.apply import apply
from billhook.recipes.compress import compress
from billhook.recipes.evaluate import evaluate
from billhook.recipes.heal import heal
from billhook.recipes.workplace import workplace
from billhook.surgery.reopen import load

WEIGHTS = "model.safetensors"
TOKENS = 1024  # four steps

KILL = """
import os, signal, sys
from billhook.heal.training import loop
from billhook.recipes import heal as walk
from billhook.recipes import proof, texts, training

keep, calls = loop.keep, []
def dying(*args):
    keep(*args)
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
loop.keep = dying
SMALL
walk.heal(sys.argv[1], out=sys.argv[2], calibration=sys.argv[3], tokens=int(sys.argv[4]))
"""

CTRL_C = """
import os, signal, sys
from billhook.cli import main
from billhook.heal.training import loop
from billhook.recipes import heal as walk
from billhook.recipes import proof, texts, training

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
keep, calls = loop.keep, []
def interrupted(*args):
    keep(*args)
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
loop.keep = interrupted
SMALL
main()
"""

SIZES = {
    (training, "TRAINING_LENGTH"): 64,
    (texts, "CALIBRATION_LENGTH"): 64,
    (texts, "HEALING_TOKENS"): 1024,
    (proof, "EVALUATION_TOKENS"): 512,
    (proof, "EVALUATION_LENGTH"): 64,
}
SMALL = "\n".join(f"{module.__name__.split('.')[-1]}.{name} = {size}" for (module, name), size in SIZES.items())


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, name), size in SIZES.items():
        monkeypatch.setattr(module, name, size)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(Path(argparse.__file__).read_text()[:80_000])
    return path


@pytest.fixture(scope="module")
def cut(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "cut"
    apply(tiny_lm, Plan.of(["decoder.1", "decoder.3.mlp"], target="remote"), out=out)  # type: ignore[arg-type]
    return out


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the proof, which other tests are about."""
    monkeypatch.setattr(walk, "proven", lambda run, *_: run)


@pytest.mark.usefixtures("unproven")
def test_killed_and_run_again(cut: Path, words: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = heal(cut, out=whole, calibration=str(words), tokens=TOKENS)
    command = [sys.executable, "-c", KILL.replace("SMALL", SMALL), cut, out, words, str(TOKENS)]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    steps: list[int] = []

    def progress(label: str, done: int, total: int) -> None:
        assert label != "healing", "closed form is not done again"
        steps.extend([done] if label == "training" else [])

    again = heal(cut, out=out, calibration=str(words), tokens=TOKENS, progress=progress)
    assert steps == [3, 4], "two looks were paid for"
    assert again.healing == expected.healing
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert not workplace(out).exists()


@pytest.mark.usefixtures("unproven")
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(cut: Path, words: Path, tmp_path: Path) -> None:
    """A process of its own, with the signal that a terminal sends."""
    out = tmp_path / "out"
    asked = ["heal", cut, "--out", out, "--calibration", words, "--tokens", str(TOKENS)]
    command = [sys.executable, "-c", CTRL_C.replace("SMALL", SMALL), *map(str, asked)]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == 130, stopped.stderr
    said = [line for line in stopped.stderr.splitlines() if " of " not in line]  # how far it has come, now and then
    assert said == ["billhook: interrupted; run the same command again to resume"] and stopped.stdout == ""
    assert not out.exists() and not list(tmp_path.glob("*.part"))
    steps: list[int] = []
    heal(
        cut, out=out, calibration=str(words), tokens=TOKENS,
        progress=lambda label, done, _: steps.extend([done] if label == "training" else []),
    )  # fmt: skip
    assert steps == [3, 4] and (out / WEIGHTS).exists() and not workplace(out).exists()


def test_the_whole_walk(cut: Path, tiny_lm: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distilled; then healed once more, by something that makes it worse."""
    monkeypatch.setattr(proof, "bench", lambda *_, **__: ())
    monkeypatch.setattr(proof, "probes", lambda *_, **__: ())
    out = tmp_path / "out"
    run = heal(cut, out=out, calibration=str(words), tokens=TOKENS, max_new_tokens=2)
    assert run == Run.model_validate_json((out / "billhook.json").read_text())
    assert run.model == str(tiny_lm)
    assert run.healing is not None and run.healing.training is not None
    told = run.healing.training
    assert run.healing.method == "distill" and any(refit.taken for refit in run.healing.refits)
    assert told.tokens == TOKENS and told.best > 0
    assert len(told.untrained) == len(run.healing.unhealed) == 2
    cut_kl, begun_kl, kl = (side[0].kl.value for side in (run.healing.unhealed, told.untrained, run.evidence))
    assert max(begun_kl, kl) < cut_kl and begun_kl != kl
    page = (out / "report.html").read_text()
    assert "The training" in page and "not yet trained" in page and "loss along the training" in page
    assert "trained on little text" in (out / "README.md").read_text()
    assert len(load(out).model.model.layers) == 4

    with pytest.raises(InputError, match=r"was trained \(distill\), and closed-form has its place before that"):
        heal(out, out=tmp_path / "again", method="closed-form", calibration=str(words))


@pytest.mark.usefixtures("unproven")
def test_what_is_worse_is_not_taken_and_the_record_says_so(
    cut: Path, tiny_lm: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    worse = Healing({name: 3 * load_file(tiny_lm / WEIGHTS)[name]}, (), {}, 0, 0)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    known = heal(cut, out=one, method="closed-form", calibration=str(words)).healing
    assert known is not None and not known.in_vain
    with monkeypatch.context() as patch:
        patch.setitem(walk.METHODS, "closed-form", lambda *_: worse)  # type: ignore[arg-type]
        run = heal(one, out=two, method="closed-form", calibration=str(words), seed=5)
    assert run.healing is not None
    assert run.healing.steps == known.steps and run.healing.refits == known.refits
    assert [step.seed for step in run.healing.in_vain] == [5]
    first, second = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    assert all((first[name] == second[name]).all() for name in first)

    monkeypatch.setattr(training, "better", lambda *args: args[3])
    again = heal(two, out=three, method="closed-form", calibration=str(words), seed=6).healing
    assert again is not None and not again.in_vain
    assert [step.seed for step in again.steps] == [6], "it begins at the dense weights: nothing from before is in it"


@pytest.mark.usefixtures("unproven")
def test_what_was_healed_is_not_refitted_before_it_is_trained(cut: Path, words: Path, tmp_path: Path) -> None:
    heal(cut, out=tmp_path / "one", method="closed-form", calibration=str(words))
    refitted = Run.model_validate_json((tmp_path / "one" / "billhook.json").read_text()).healing
    assert refitted is not None and refitted.training is None

    def progress(label: str, done: int, total: int) -> None:
        assert label != "healing"

    run = heal(tmp_path / "one", out=tmp_path / "two", calibration=str(words), tokens=512, progress=progress)
    assert run.healing is not None and run.healing.refits == refitted.refits
    assert run.healing.training is not None


@pytest.mark.usefixtures("unproven")
def test_text_that_the_model_writes_is_kept_until_the_end(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(training, "taught", lambda *args: seen.append(args[5].ids) or 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            heal(cut, out=tmp_path / "out", calibration="self", tokens=128)
        (kept,) = workplace(tmp_path / "out").glob("text-*.safetensors")
    assert (seen[0] == seen[1]).all() and (load_file(kept)["ids"] == seen[0]).all()


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize(
    ("select", "calibration"), [("dsir:builtin", "words"), ("loss", "words"), ("distinct", "self")]
)
def test_text_is_selected_and_the_record_says_how(
    select: str, calibration: str, cut: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted when the training begins, the windows are not weighed again."""
    text = str(words) if calibration == "words" else calibration

    def go() -> Run:
        return heal(cut, out=tmp_path / "out", method="tune", calibration=text, select=select, tokens=TOKENS)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go()
    monkeypatch.setattr(training, "select", None)
    run = go()
    assert run.healing is not None and run.healing.training is not None
    told = run.healing.training.selection
    assert told is not None and told.word == select.partition(":")[0]
    assert told.windows >= TOKENS // 64 - 1
    assert told.chosen == (TOKENS // 64 if told.word == "dsir" else told.windows)
    assert told.target == ("builtin, first 80%" if told.word == "dsir" else "")
    assert told.parts > told.duplicates >= 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "training text selected" in page and f"{told.chosen:,} of {told.windows:,}" in page


def test_refusals_are_one_line_and_leave_nothing(cut: Path, tiny_lm: Path, words: Path, tmp_path: Path) -> None:
    def refused(source: Path, message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message) as error:
            heal(source, out=tmp_path / "out", **{"calibration": str(words), **options})
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists() and not workplace(tmp_path / "out").exists()

    refused(tiny_lm, "not a cut model with a record")
    refused(tmp_path / "nothing", "nothing is no folder")
    refused(cut / "billhook.json", "billhook.json is no folder")
    refused(cut, "bias is for what a narrowing leaves, and this plan narrows nothing", method="bias")
    refused(cut, "at least 1 token", tokens=0)
    refused(cut, "selection best is unknown; --select takes none, distinct, dsir", select="best")
    refused(cut, "closed-form does not train", select="paser", method="closed-form")
    refused(cut, "--select loss has no target; leave out :some.txt", select="loss:some.txt")
    refused(cut, r"chooses within one text; leave out \+exercises", select="loss", calibration="builtin+exercises")
    refused(cut, "text nothing.txt does not exist", select="dsir:nothing.txt")
    refused(cut, "has nothing to choose from: the training reads 6250 windows", select="paser", tokens=400_000)
    refused(cut, "does not exist", against=str(tmp_path / "nowhere.gguf"))
    refused(cut, "has other weights than its plan leaves", against=str(cut))
    record = json.loads((cut / "billhook.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in cut.iterdir():
        (other / file.name).symlink_to(file)
    (other / "billhook.json").unlink()
    (other / "billhook.json").write_text(json.dumps(record | {"model": "gone.gguf"}))
    refused(other, r"gone.gguf does not exist \(the dense model, says the record; --against names it where it is now\)")
    record["plan"]["provenance"]["model"] = "0" * 64
    (other / "billhook.json").write_text(json.dumps(record))
    refused(other, "was cut from another model")
    (other / "billhook.json").write_text("{")
    refused(other, "is damaged, or of another version of Billhook")
    (words.parent / "short.txt").write_text("too short a text\nto train on\n")
    with pytest.raises(InputError, match="give a longer text"):
        heal(cut, out=tmp_path / "out", calibration=str(words.parent / "short.txt"))
    with pytest.raises(InputError, match="already exists"):
        heal(cut, out=other, calibration=str(words))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_dense_model_is_known_in_every_precision(
    dtype: str, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "require_causal", lambda *_: 1 / 0)  # what comes next
    with pytest.raises(ZeroDivisionError):
        heal(cut, out=tmp_path / "out", dtype=dtype)


def test_what_another_model_left_is_not_taken_up(tiny_lm: Path, tmp_path: Path) -> None:
    """The same plan, text and place, but other weights: refitted anew, and the record of it comes back whole."""
    from billhook.recipes.opened import opened

    text = Windows.of(torch.randint(3, 290, (4, 32), generator=torch.Generator().manual_seed(0)), "text")
    plan = Plan.of(["decoder.2"])
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    first = training._refitted(model, plan, text, tmp_path, None)
    again = training._refitted(model, plan, text, tmp_path, None)
    assert (again.refits, again.grafts, again.cut, again.healed) == (
        first.refits, first.grafts, first.cut, first.healed,
    )  # fmt: skip
    assert len(list(tmp_path.glob("refitted-*"))) == 1
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(1.5)
    training._refitted(model, plan, text, tmp_path, None)
    assert len(list(tmp_path.glob("refitted-*"))) == 2


def test_the_dense_model_is_not_replaced_by_what_is_healed(tiny_lm: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(tiny_lm, dense)
    compress(dense, budget="blocks=4", out=tmp_path / "cut", recipe="last", heal="none")
    with pytest.raises(InputError, match="dense"):
        heal(tmp_path / "cut", out=dense, method="closed-form", overwrite=True)


def test_bridged_then_trained_then_only_run(tiny_lm: Path, words: Path, tmp_path: Path) -> None:
    """The record counts what stands beside; a training leaves it as it is; what cuts models refuses such a one."""
    cut, one, two = (tmp_path / name for name in ("cut", "one", "two"))
    apply(tiny_lm, Plan.of(["decoder.1"], target="remote"), out=cut)  # type: ignore[arg-type]
    assert "trust_remote_code" not in (cut / "README.md").read_text(), "an ordinary checkpoint without a bridge"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "bench", lambda *_, **__: ())
        patch.setattr(proof, "probes", lambda *_, **__: ())
        run = heal(cut, out=one, method="bridge", calibration=str(words), max_new_tokens=2)
    before = Run.model_validate_json((cut / "billhook.json").read_text()).costs["params"]
    healing = run.healing
    assert healing is not None and healing.bridges.keys() == {"model.layers.0"}
    (rank,) = healing.bridges.values()
    width = run.outline.stacks[0].hidden_size
    assert run.costs["params"].compressed == before.compressed + 2 * rank * width
    assert run.realised["params"] == run.costs["params"].compressed / before.dense
    assert f"1, of rank {rank}" in (one / "report.html").read_text()
    assert "trust_remote_code=True" in (one / "README.md").read_text()
    found = evaluate(one).costs
    assert {kind: cost.compressed for kind, cost in found.items()} == pytest.approx(
        {kind: cost.compressed for kind, cost in run.costs.items()}
    )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "proven", lambda run, *_: run)
        for method in ("lisa", "distill"):
            taught = heal(one, out=two, method=method, calibration=str(words), tokens=512, overwrite=True)
            assert taught.healing is not None and taught.healing.bridges == healing.bridges
            assert taught.costs == run.costs
            first, second = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
            assert first.keys() == second.keys() and any(not torch.equal(first[key], second[key]) for key in first)
            assert all(torch.equal(first[key], second[key]) for key in first if ".bridge." in key)
        for taken in (2, 3):  # of the two that are compared: as it was, or refitted without a bridge
            patch.setattr(training, "better", lambda *args, taken=taken: args[taken])
            again = heal(one, out=two, method="closed-form", calibration=str(words), overwrite=True)
            assert again.healing is not None and bool(again.healing.bridges) == (taken == 2)
            assert again.costs["params"] == (run.costs["params"] if taken == 2 else before)

    with pytest.raises(InputError, match="has bridges behind blocks, with which it can only be run, or healed further"):
        compress(one, budget="blocks=3", out=tmp_path / "no")
    with pytest.raises(InputError, match="--heal bridge adds parameters"):
        compress(tiny_lm, budget="blocks=3", out=tmp_path / "no", heal="bridge")
    for target in ("uniform", "deci"):
        apply(tiny_lm, Plan.of(["decoder.1"], target=target), out=tmp_path / target)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"which target {target} asks for; cut with target remote or any"):
            heal(tmp_path / target, out=tmp_path / "no", method="bridge", calibration=str(words))
    with pytest.raises(InputError, match="has bridges behind blocks"):
        apply(one, Plan.of(["decoder.2"], target="remote"), out=tmp_path / "no")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has bridges behind blocks"):
        heal(cut, out=tmp_path / "no", against=one, method="bridge", calibration=str(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("billhook.plan.processes.count", lambda: 2)
        walk.require_sharable("bridge")
        with pytest.raises(InputError, match="which eora is not"):
            walk.require_sharable("eora")
    assert not (tmp_path / "no").exists()
