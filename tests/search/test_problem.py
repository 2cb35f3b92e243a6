import pytest
from outlines import block, outline, stack
from synthetic import problem

from billhook.measure.cost import CostModel
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.target import Target
from billhook.search.path import Path
from billhook.search.problem import pose


@pytest.mark.parametrize(
    ("budget", "unit", "message"),
    [
        ("params=0.01", "sublayer", "with every sublayer of this paper model gone that may go, params is still 0.0"),
        ("params=0.2", "attention", "params is still 0.8"),
        ("blocks=2", "sublayer", "dropping one sublayer of this paper model saves no blocks; use another unit"),
        ("kv_bytes=0.5", "mlp", "dropping one mlp of this paper model saves no kv_bytes; use another unit"),
        ("params=10M", "block", "asks for no reduction"),
        ("params=0.8", "cross_attention", "no cross_attention of this paper model can be dropped for target any"),
    ],
)
def test_a_budget_without_a_solution_is_refused_before_the_search(budget: str, unit: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        pose(outline(4), Budget.parse(budget), unit)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_targets_are_checked_first() -> None:
    with pytest.raises(InputError, match="no sublayer of this paper model can be dropped for target uniform"):
        pose(outline(4), Budget.parse("params=0.8"), "sublayer", Target.UNIFORM)
    pins = {"decoder.1.mlp": "it is lent", **{f"decoder.{i}": "all of one piece" for i in range(4)}}
    with pytest.raises(InputError, match="no block of this paper model can be dropped for target uniform: all of one"):
        pose(outline(4, pinned=pins), Budget.parse("params=0.8"), "block", Target.UNIFORM)
    barred = outline(4, refused={Target.DECI: "of its norms"})
    with pytest.raises(InputError, match="target deci is not possible for this paper model: of its norms"):
        pose(barred, Budget.parse("params=0.8"), "block", Target.DECI)


def pair() -> Outline:
    return outline(stack(4, "encoder", causal=False), 6)


def test_a_stack_can_be_chosen() -> None:
    posed = pose(pair(), Budget.parse("params=0.9"), "block", stack="encoder")
    assert {unit.stack for unit in posed.candidates} == {"encoder"}
    with pytest.raises(InputError, match="of stack vision of this paper model can be dropped"):
        pose(pair(), Budget.parse("params=0.9"), "block", stack="vision")


def test_open_units_are_those_that_help_and_leave_a_model() -> None:
    posed = pose(outline(2), Budget.parse("params=0.3"), "sublayer")
    path = Path(posed, {Address("decoder", 0, "attention")})
    assert Address("decoder", 1, "attention") not in path.open(), "the last attention"
    assert Address("decoder", 0, "attention") not in path.open(), "gone already"
    tight = pose(outline(3), Budget.parse("kv_bytes=0.5"), "sublayer")
    assert {unit.sublayer for unit in Path(tight).open()} == {"attention"}, "an mlp saves no cache"


def test_only_what_is_still_missing_counts_as_gain() -> None:
    posed = pose(outline(4), Budget.parse("params=0.9"), "sublayer")  # 160 of 1600 have to go
    assert Path(posed).open()[Address("decoder", 0, "mlp")] == pytest.approx(1.0)
    assert Path(posed).open()[Address("decoder", 0, "attention")] == pytest.approx(100 / 160)
    after = Path(posed, {Address("decoder", 3, "attention")})
    gains = after.open()
    assert gains[Address("decoder", 0, "mlp")] == pytest.approx(gains[Address("decoder", 0, "attention")])
    assert after.progress == pytest.approx(100 / 160)


def test_two_limits_pull_together_and_a_met_one_does_not() -> None:
    posed = pose(outline(10), Budget.parse("params=0.9,kv_bytes=0.8"), "sublayer")
    attention, mlp = Address("decoder", 0, "attention"), Address("decoder", 0, "mlp")
    gains = Path(posed).open()
    assert gains[attention] == pytest.approx(100 / 400 + 1 / 2)
    assert gains[mlp] == pytest.approx(300 / 400)
    met = Path(posed, {Address("decoder", i, "attention") for i in (1, 2)})
    assert met.open()[attention] == pytest.approx(100 / 400), "the cache is small enough"


def test_steps_record_the_realised_budget() -> None:
    path = Path(problem(4, "params=0.5"))
    path.step([Address("decoder", 1, "mlp"), Address("decoder", 1, "attention")], score=0.5, objective=2.0, work=7)
    path.step(restored=[Address("decoder", 1, "mlp")])
    first, second = path.steps
    assert first.units == ("decoder.1.attention", "decoder.1.mlp")
    assert (first.score, first.objective, first.work) == (0.5, 2.0, 7)
    assert first.realised["blocks"] == 0.75
    assert second.restored == ("decoder.1.mlp",)
    assert first.realised["params"] < second.realised["params"] < 1
    assert path.found().drops == {Address("decoder", 1, "attention")}


@pytest.mark.parametrize("dearest", [0, 1, 2])
def test_of_what_is_spare_the_most_important_comes_back_first(dearest: int) -> None:
    posed = pose(outline(4), Budget.parse("params=0.6875"), "sublayer")  # 500 of 1600 have to go
    attentions = [Address("decoder", i, "attention") for i in range(3)]
    mlp = Address("decoder", 3, "mlp")
    path = Path(posed, {*attentions, mlp})
    path.trim(lambda unit: 2.0 if unit == attentions[dearest] else 1.0, work=7)
    assert path.drops == {*attentions, mlp} - {attentions[dearest]}, "and only one of them is spare"
    assert [(step.restored, step.work) for step in path.steps] == [((str(attentions[dearest]),), 7)]


def test_a_block_that_went_in_parts_is_found_as_a_block() -> None:
    path = Path(problem(4, "params=0.5"))
    for kind in ("attention", "mlp"):
        path.step([Address("decoder", 2, kind)])
    assert path.found().drops == {Address("decoder", 2)}
    kept_norms = Path(pose(outline(stack([block(rest=3)] * 4)), Budget.parse("params=0.7")))
    kept_norms.step([Address("decoder", 2, "attention"), Address("decoder", 2, "mlp")])
    assert len(kept_norms.found().drops) == 2


def test_gains_are_exact_for_every_kind() -> None:
    posed = problem(5, "params=0.7,size=0.7,flops=0.7,kv_bytes=0.7")
    costs = CostModel(posed.outline)
    for unit in posed.candidates:
        assert posed.costs.of({unit}) == pytest.approx(costs.of({unit}))
