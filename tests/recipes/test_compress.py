"""The whole walk: killed anywhere, it leaves nothing half-written and goes on to the same result."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from billhook.models import load
from billhook.plan.errors import InputError
from billhook.plan.record import Run
from billhook.recipes.apply import apply
from billhook.recipes.compress import compress
from billhook.recipes.workplace import workplace

KILL = """
import os, signal, sys
from billhook.recipes import compress as walk
from billhook.search.ledger import Ledger

def dying(function, after):
    calls = iter(range(after))
    def wrapped(*args, **kwargs):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

where, source, out = sys.argv[1:]
if where == "search":
    Ledger.record = dying(Ledger.record, 9)
else:
    walk.write_down = dying(walk.write_down, 0)
walk.compress(source, budget="params=0.7", out=out, recipe="sublayer-greedy", heal="none", max_new_tokens=4)
"""


@pytest.fixture(scope="module")
def whole(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return compress(tiny_lm, budget="params=0.7", out=out, recipe="sublayer-greedy", heal="none", max_new_tokens=4), out


@pytest.mark.parametrize("where", ["search", "saving"])
def test_killed_and_run_again(where: str, whole: tuple[Run, Path], tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILL, where, tiny_lm, out], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    assert any(workplace(out).glob("*.jsonl"))

    again = compress(tiny_lm, budget="params=0.7", out=out, recipe="sublayer-greedy", heal="none", max_new_tokens=4)
    assert again.plan.dumps() == whole[0].plan.dumps()
    assert again.search == whole[0].search
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (whole[1] / weights).read_bytes()
    assert not workplace(out).exists()


JOBS = """
import sys
from billhook.recipes.compress import compress
source, place, *recipes = sys.argv[1:]
for number, recipe in enumerate(recipes):
    compress(source, budget="params=0.7", out=f"{place}/{number}", recipe=recipe, max_new_tokens=4)
"""


def test_two_runs_in_one_process_are_two_processes(tiny_lm: Path, tmp_path: Path) -> None:
    """What a first run leaves in the process changes nothing of a second one."""
    recipes = ("sublayer-greedy", "block-greedy")
    for name, jobs in (("both", recipes), ("second", recipes[1:])):
        subprocess.run([sys.executable, "-c", JOBS, tiny_lm, tmp_path / name, *jobs], check=True, capture_output=True)
    after, alone = (tmp_path / place for place in ("both/1", "second/0"))
    one, two = (Run.model_validate_json((out / "billhook.json").read_text()) for out in (after, alone))
    assert one.plan == two.plan
    assert one.search == two.search and one.measures == two.measures
    assert one.evidence == two.evidence and one.generations == two.generations
    assert (after / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert (after / "config.json").read_text() == (alone / "config.json").read_text()


def test_memory_that_runs_out_is_not_worked_around(tiny_lm: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """No smaller batch, no other text: the run ends, and says why."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch.Tensor, "log_softmax", full)
    with pytest.raises(torch.OutOfMemoryError):
        compress(tiny_lm, budget="params=0.7", out=tmp_path / "out", recipe="block-influence")
    assert not (tmp_path / "out").exists()


def test_the_record_is_what_was_returned(whole: tuple[Run, Path]) -> None:
    run, out = whole
    assert Run.model_validate_json((out / "billhook.json").read_text()) == run
    assert {path.name for path in out.iterdir()} >= {"config.json", "README.md", "report.html", "model.safetensors"}
    assert run.realised["params"] <= 0.7
    assert [text.domain for text in run.evidence] == ["calibration", "other"]


def test_evidence_is_about_text_that_the_search_never_saw(whole: tuple[Run, Path]) -> None:
    run, _ = whole
    assert run.measures is not None
    assert run.measures.calibration == "builtin"
    assert run.evidence[0].name == "builtin, last 20%"


def test_refused_before_the_model_is_even_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="target uniform"):
        compress("no/such model", budget="params=0.8", out=tmp_path / "out", recipe="sublayer-greedy", target="uniform")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "budget", "recipe"),
    [
        (None, "params=0.7", "angular-widths"),
        ("deci", "params=0.7", "angular-widths"),
        (None, "params=0.2", "sublayer-greedy"),  # less than the attentions have
        (None, "kv_bytes=0.7", "sublayer-greedy"),
        ("uniform", "params=0.7", "block-greedy"),
    ],
)
def test_recipe_follows_from_target_and_budget(
    target: str | None, budget: str, recipe: str, tiny_lm: Path, tmp_path: Path
) -> None:
    run = compress(tiny_lm, budget=budget, out=tmp_path / "out", target=target, heal="none", max_new_tokens=4)
    assert run.plan.target == (target or "remote")
    assert run.plan.provenance.recipe == recipe


def test_until_the_cliff(tiny_lm: Path, tmp_path: Path) -> None:
    """All MLPs but one write next to nothing."""
    model = load(str(tiny_lm)).model
    with torch.no_grad():
        for block in (0, 2, 3, 4):
            model.model.layers[block].mlp.down_proj.weight.mul_(1e-5)
    shutil.copytree(tiny_lm, tmp_path / "idle")
    model.save_pretrained(tmp_path / "idle")
    run = compress(tmp_path / "idle", budget="until=cliff", out=tmp_path / "out", recipe="mlp-drop", max_new_tokens=4)
    assert sorted(map(str, run.plan.drops)) == [f"decoder.{block}.mlp" for block in (0, 2, 3, 4)]
    assert (run.asked, run.plan.budget) == ("until=cliff", "until=cliff")
    assert run.search is not None and len(run.search.steps) == 5
    assert run.search.objective == "divergence from dense"
    assert Run.model_validate_json((tmp_path / "out" / "billhook.json").read_text()) == run
    assert "the cliff" in (tmp_path / "out" / "report.html").read_text()


def test_too_few_positions_for_the_probes_are_refused_before_the_search(tiny_lm: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_lm, tmp_path / "short"))
    config = model / "config.json"
    config.write_text(re.sub(r'"max_position_embeddings": \d+', '"max_position_embeddings": 100', config.read_text()))
    with pytest.raises(InputError, match=r"probes take up to \d+ tokens, but LlamaForCausalLM has 100 positions"):
        compress(model, budget="params=0.7", out=tmp_path / "out", max_new_tokens=4)
    assert not workplace(tmp_path / "out").exists()


def test_until_the_cliff_is_refused_before_the_model_is_even_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe first \(first\) has none: use a greedy or one-shot recipe"):
        compress("no/such model", budget="until=cliff", out=tmp_path / "out", recipe="first")


@pytest.fixture(scope="module")
def mended(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    out = tmp_path_factory.mktemp("mended") / "out"
    return compress(tiny_lm, budget="params=0.7", out=out, recipe="sublayer-greedy", max_new_tokens=4), out


def test_a_healed_result_says_how(mended: tuple[Run, Path], whole: tuple[Run, Path]) -> None:
    run, out = mended
    assert Run.model_validate_json((out / "billhook.json").read_text()) == run
    assert run.plan.drops == whole[0].plan.drops
    assert whole[0].healing is None
    assert run.healing is not None
    assert run.healing.method == "closed-form"
    assert any(refit.taken for refit in run.healing.refits)
    assert run.healing.unhealed == whole[0].evidence
    assert run.evidence[0].kl.value < run.healing.unhealed[0].kl.value
    assert run.seconds["heal"] > 0
    page = (out / "report.html").read_text()
    assert "cut and not yet healed" in page and "weights refitted" in page
    assert "cut and not yet healed" not in (whole[1] / "report.html").read_text()


def test_a_healed_checkpoint_is_an_ordinary_one(mended: tuple[Run, Path], whole: tuple[Run, Path]) -> None:
    """The same tensors under the same names; those that differ are the refitted ones."""
    new, old = (load_file(out / "model.safetensors") for _, out in (mended, whole))
    assert {key: t.shape for key, t in new.items()} == {key: t.shape for key, t in old.items()}
    changed = [key for key, tensor in new.items() if not tensor.equal(old[key])]
    assert mended[0].healing is not None
    taken = sum(refit.taken for refit in mended[0].healing.refits)
    assert 0 < taken <= len(changed) <= taken + 4 * len(mended[0].healing.grafts), "a graft brings reads and a write"
    assert (mended[1] / "config.json").read_text() == (whole[1] / "config.json").read_text()


def test_a_plan_alone_cannot_heal(mended: tuple[Run, Path], tiny_lm: Path, tmp_path: Path) -> None:
    run = apply(tiny_lm, mended[1], out=tmp_path / "out")
    assert "of a healed result" in run.environment["not healed"]
    assert run.healing is None
    assert "not healed" not in apply(tiny_lm, run.plan, out=tmp_path / "plain").environment
    assert "billhook apply" not in (mended[1] / "README.md").read_text()
    assert "billhook apply" in (tmp_path / "out" / "README.md").read_text()
    assert "--heal closed-form" in (mended[1] / "README.md").read_text()
