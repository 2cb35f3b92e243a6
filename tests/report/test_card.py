from __future__ import annotations

import ast
import re

import pytest
import yaml
from example import example_run, hostile_run, inspection, two_stacks

from billhook.plan.address import Address
from billhook.plan.plan import Plan
from billhook.plan.record import HealRecord, HealStep
from billhook.plan.schedule import Schedule
from billhook.plan.target import Target
from billhook.report.card import card
from billhook.report.cuts import dropped
from billhook.report.loading import is_ordinary


def front(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter() -> None:
    assert front(card(example_run())) == {
        "library_name": "transformers",
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "pipeline_tag": "text-generation",
        "tags": ["billhook", "pruned", "depth-pruning", "target-remote"],
    }
    assert front(card(two_stacks()))["library_name"] == "billhook"
    assert "pipeline_tag" not in front(card(two_stacks()))


@pytest.mark.parametrize("model", ["demo", "models/a/b", "/models/x", "./x", "a: b\n- c", "x.gguf"])
def test_only_a_hub_id_is_a_base_model(model: str) -> None:
    assert "base_model" not in front(card(example_run().model_copy(update={"model": model})))


@pytest.mark.parametrize(
    ("units", "target", "expected"),
    [
        (["decoder.3"], Target.UNIFORM, 'from_pretrained("path/to/this/folder")'),
        (["decoder.3"], Target.REMOTE, 'from_pretrained("path/to/this/folder")'),  # whole blocks: no remote code needed
        (["decoder.3.mlp"], Target.REMOTE, "trust_remote_code=True"),
        (["decoder.3.mlp"], Target.DECI, "vllm serve"),
        (["decoder.3.mlp"], Target.ANY, "billhook.load("),
    ],
)
def test_how_to_load(units: list[str], target: Target, expected: str) -> None:
    text = card(example_run().model_copy(update={"plan": Plan.of(units, target)}))
    language, code = re.search(r"## How to load it.*?```(\w+)\n(.*?)```", text, re.DOTALL).groups()
    assert expected in code
    if language == "python":
        ast.parse(code)


def test_tables_are_whole() -> None:
    text = card(example_run())
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert [table.count("\n") for table in tables] == [2 + 4, 2 + 2, 2 + 3, 2 + 3]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| copying words (24) | 83.3% | 25.0% | −58 (−80 to −37) |" in text
    assert "| TinyStories (another domain) | 9.42 (8.95 to 9.89) | 24.8 (23.3 to 26.3) |" in text


def test_commands_can_be_pasted() -> None:
    run = example_run().model_copy(update={"model": "my models/x"})
    assert "billhook apply 'my models/x' billhook.json --out DIR\n" in card(run)
    compress = "--budget params=0.8 --target remote --recipe greedy --calibration wiki_calib --heal none --seed 0"
    assert f"{compress} --out DIR\n" in card(run)
    assert "billhook compress" not in card(run.model_copy(update={"asked": None}))


def test_commands_name_every_healing_in_turn() -> None:
    def lines(*steps: HealStep) -> list[str]:
        healing = HealRecord(tokens=8, work=1, refits=(), steps=steps)
        text = card(example_run().model_copy(update={"healing": healing}))
        return [line for line in text.splitlines() if line.startswith("billhook ")]

    own = HealStep(method="closed-form", text="wiki_calib", seed=0)
    act = HealStep(method="fuse", text="wiki_calib", seed=0)
    other = HealStep(method="distill", text="mine.txt", seed=3, tokens=5000, select="dsir:like.txt")
    cut, again = lines(own, other)
    assert cut.endswith("--heal closed-form --seed 0 --out CUT")
    told = "--method distill --select dsir:like.txt --tokens 5000 --calibration mine.txt --seed 3 --out DIR"
    assert again == f"billhook heal CUT {told}"
    cut, again = lines(act, other)
    assert "--heal" not in cut and again.startswith("billhook heal CUT --method distill")
    cut, first, second = lines(other, own)
    assert "--heal none" in cut and first.endswith("--out HEALED1") and second.startswith("billhook heal HEALED1 ")
    assert second.endswith("--method closed-form --calibration wiki_calib --seed 0 --out DIR")
    masked = HealStep(method="second-order", text="wiki_calib", seed=0)
    (cut,) = lines(masked, own.model_copy(update={"method": "tune"}))
    assert "--heal tune" in cut
    cut, bridged = lines(own.model_copy(update={"method": "bridge"}))
    assert "--heal none" in cut and bridged.startswith("billhook heal CUT --method bridge"), "compress makes none"
    assert other.read == ("mine.txt", "like.txt") and own.read == ("wiki_calib",)


def test_what_was_not_measured_is_left_out() -> None:
    text = card(two_stacks())
    assert "## Evidence" not in text
    assert "## Speed" not in text
    assert "## Limits" in text
    assert "Nothing." in card(inspection())


def test_markup_in_the_run_stays_text() -> None:
    text = card(hostile_run()).split("## Make it again")[0]
    assert "<img" not in text.replace("\\<img", "")
    for line in re.findall(r"^\|.*", text, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", line)) in (5, 7)


def test_a_schedule_that_leaves_blocks_out_and_one_that_loops() -> None:
    """What never runs is a removal; a loop is no ordinary checkpoint."""
    run = example_run()
    rest = Plan(target=Target.UNIFORM, schedule=Schedule.chain([i for i in range(30) if i != 7]))
    assert dropped(run.model_copy(update={"plan": rest})) == {Address("decoder", 7)}
    assert is_ordinary(run.model_copy(update={"plan": rest}))
    loop = run.model_copy(update={"plan": Plan(target=Target.REMOTE, schedule=Schedule.chain([*range(30), 28, 29]))})
    assert not dropped(loop) and not is_ordinary(loop)
    assert "weight-sharing" in front(card(loop))["tags"]  # type: ignore[operator]
    assert "weight-sharing" not in front(card(run.model_copy(update={"plan": rest})))["tags"]  # type: ignore[operator]
