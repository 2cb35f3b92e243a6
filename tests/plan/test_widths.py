import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outlines import attention, mlp, outline, stack

from billhook.plan.address import Address
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.outline import BlockOutline, InnerOutline, Outline
from billhook.plan.plan import Keep, Plan
from billhook.plan.ranges import parse_ranges, write_ranges
from billhook.plan.target import Target
from billhook.plan.widths import common_sizes, narrowing

NEURONS = InnerOutline(count=16, params=18, active_params=18, key="config.intermediate_size")
GROUPS = InnerOutline(
    count=4, params=20, active_params=20, heads=3, kv_heads=1, cache_width=2, key="config.heads", amount=3, divides=24
)
EXPERTS = InnerOutline(count=8, params=30, active_params=2, least=4, parts=2)


def blocks(number: int = 3, mixture: bool = False) -> Outline:
    def one() -> BlockOutline:
        wide = mlp().model_copy(update={"inner": {"expert": EXPERTS} if mixture else {"neuron": NEURONS}})
        heads = attention().model_copy(update={"inner": {"group": GROUPS}})
        return BlockOutline(sublayers={"attention": heads, "mlp": wide})

    return outline(stack([one() for _ in range(number)]))


MODEL = blocks()


def keep(unit: str, inner: str, indices: object) -> Keep:
    return Keep.model_validate({"unit": unit, "inner": inner, "indices": indices})


def refusal(keeps: list[Keep], of: Outline = MODEL, target: Target = Target.ANY, drops: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as caught:
        check(Plan.of(drops, target, keeps), of)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(st.sets(st.integers(0, 300)).map(sorted))
def test_ranges_there_and_back(numbers: list[int]) -> None:
    if numbers:
        assert parse_ranges(write_ranges(numbers)) == tuple(numbers)


def test_the_bytes_of_a_keep() -> None:
    keeps = [keep("decoder.2.mlp", "neuron", "0-3,7,9-10"), keep("decoder.1.attention", "group", "0")]
    plan = Plan.of(["decoder.0"], keeps=keeps)
    content = json.loads(plan.dumps())
    assert content["edits"] == [
        {"kind": "drop", "unit": "decoder.0"},
        {"kind": "keep", "unit": "decoder.1.attention", "inner": "group", "indices": "0"},
        {"kind": "keep", "unit": "decoder.2.mlp", "inner": "neuron", "indices": "0-3,7,9-10"},
    ]
    assert Plan.loads(plan.dumps()) == plan
    assert plan.drops == {Address("decoder", 0)}
    assert plan.keeps[1].indices == (0, 1, 2, 3, 7, 9, 10)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ("", "indices are ranges such as 0-511,514, not ''"),
        ("3-1", "indices must rise"),
        ("1,1", "indices must rise"),
        ("0-4,4", "indices must rise"),
        ("01", "indices are ranges"),
        ("1, 2", "indices are ranges"),
        ("-1", "indices are ranges"),
        (["a"], "edits.0.indices.0: Input should be a valid integer"),
    ],
)
def test_bad_indices_are_named(indices: object, message: str) -> None:
    edit = {"kind": "keep", "unit": "decoder.0.mlp", "inner": "neuron", "indices": indices}
    with pytest.raises(InputError, match=r"edits\.0\.indices") as caught:
        Plan.loads(json.dumps({"edits": [edit]}))
    assert message in str(caught.value)


@pytest.mark.parametrize("target", Target)
def test_equal_neurons_everywhere_are_possible_for_every_target(target: Target) -> None:
    check(Plan.of([], target, [keep(f"decoder.{i}.mlp", "neuron", [i, 5, 7]) for i in range(3)]), MODEL)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("decoder.9.mlp", "neuron", "0"), "unit decoder.9.mlp is no sublayer of this paper model"),
        (("decoder.1", "neuron", "0"), "unit decoder.1 is no sublayer"),
        (("decoder.1.mlp.neuron.3", "neuron", "0"), "unit decoder.1.mlp.neuron.3 is no sublayer"),
        (("decoder.1.mlp", "expert", "0"), "the experts of decoder.1.mlp cannot be cut: it has no experts"),
        (("decoder.1.mlp", "neuron", "3,16"), "are numbered from 0 to 15; there is no 16"),
        (("decoder.1.mlp", "neuron", ()), "none is kept; drop decoder.1.mlp instead"),
        (("decoder.1.mlp", "neuron", (3, 1)), "indices must rise"),
        (("decoder.1.mlp", "neuron", (-1, 1)), "are numbered from 0 to 15"),
    ],
)
def test_an_impossible_keep_is_refused(edit: tuple[str, str, object], message: str) -> None:
    assert message in refusal([keep(*edit)])


def test_a_rigid_sublayer_says_why() -> None:
    rigid = mlp().model_copy(update={"rigid": "it is made of stone"})
    stone = outline(stack([BlockOutline(sublayers={"attention": attention(), "mlp": rigid})] * 2))
    assert "cannot be cut: it is made of stone" in refusal([keep("decoder.1.mlp", "neuron", "0")], stone)


def test_a_sublayer_is_dropped_or_kept_in_part() -> None:
    for gone in ("decoder.1.mlp", "decoder.1"):
        assert "both dropped and kept in part" in refusal([keep("decoder.1.mlp", "neuron", "0")], drops=(gone,))
    twice = [keep("decoder.1.mlp", "neuron", "0"), keep("decoder.1.mlp", "neuron", "1")]
    assert "twice" in refusal(twice)


def test_inner_units_are_not_dropped_one_by_one() -> None:
    assert "say which neurons to keep" in refusal([], drops=("decoder.1.mlp.neuron.3",))


def test_what_the_router_needs() -> None:
    model = blocks(mixture=True)
    check(Plan.of([], keeps=[keep("decoder.1.mlp", "expert", "0,2,5,7")]), model)
    assert "3 are too few; the router needs 4" in refusal([keep("decoder.1.mlp", "expert", "0-2")], model)
    assert "equally many of each 4 in a row" in refusal([keep("decoder.1.mlp", "expert", "0-3,5,7")], model)
    uniform = [keep(f"decoder.{i}.mlp", "expert", "0,2,5,7") for i in range(3)]
    assert "has no value that could say how many" in refusal(uniform, model, Target.UNIFORM)


def test_a_uniform_target_needs_equal_sizes_in_all_blocks_that_are_left() -> None:
    some = [keep(f"decoder.{i}.mlp", "neuron", "0-7") for i in range(2)]
    assert "equally many in every block" in refusal(some, target=Target.UNIFORM)
    check(Plan.of(["decoder.2"], Target.UNIFORM, some), MODEL)
    check(Plan.of([], Target.REMOTE, some), MODEL)


def test_a_config_that_wants_heads_to_divide_the_hidden_size() -> None:
    groups = {n: [keep(f"decoder.{i}.attention", "group", tuple(range(n))) for i in range(3)] for n in (2, 3)}
    check(Plan.of([], Target.UNIFORM, groups[2]), MODEL)  # 6 heads
    assert "of a number that its config takes" in refusal(groups[3], target=Target.UNIFORM)  # 9


def test_deci_carries_widths_of_mlps_only() -> None:
    check(Plan.of([], Target.DECI, [keep("decoder.1.mlp", "neuron", "0")]), MODEL)
    assert "same query heads" in refusal([keep("decoder.1.attention", "group", "0")], target=Target.DECI)


def test_keeping_all_is_no_narrowing() -> None:
    edits = [keep("decoder.0.mlp", "neuron", "0-15"), keep("decoder.1.mlp", "neuron", "0-14")]
    assert narrowing(edits, MODEL) == (edits[1],)
    check(Plan.of([], Target.UNIFORM, edits[:1]), MODEL)


def test_a_narrower_outline() -> None:
    attended, other = Address("decoder", 1, "attention"), Address("decoder", 0, "mlp")
    narrow = MODEL.narrowed({(attended, "group"): 1, (other, "neuron"): 6})
    assert MODEL.block_params - narrow.block_params == 3 * 20 + 10 * 18
    attention = narrow.stacks[0].blocks[1].sublayers["attention"]
    assert (attention.cache_width, attention.inner["group"].count) == (8 - 3 * 2, 1)
    assert narrow.stacks[0].blocks[0].sublayers["mlp"].neurons == 6
    assert common_sizes(narrow, ()) == {"config.intermediate_size": None, "config.heads": None}
    assert common_sizes(MODEL, ()) == {"config.intermediate_size": 16, "config.heads": 12}
