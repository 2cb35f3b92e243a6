from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outlines import attention, block, outline, stack

from billhook.plan.address import Address
from billhook.plan.check import check, normalise, survivors, units
from billhook.plan.errors import InputError
from billhook.plan.outline import BlockOutline, Outline
from billhook.plan.plan import Plan
from billhook.plan.target import Target

FOUR = outline(4)


def drops(*texts: str) -> frozenset[Address]:
    return frozenset(map(Address.parse, texts))


def refusal(texts: Iterable[str], of: Outline = FOUR, target: Target = Target.ANY) -> str:
    with pytest.raises(InputError) as caught:
        check(Plan.of(texts, target), of)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize(
    "texts", [[], ["decoder.0"], ["decoder.1.attention", "decoder.1.mlp"], ["decoder.0", "decoder.1"]]
)
def test_whole_blocks_can_go_for_every_target(texts: list[str], target: Target) -> None:
    check(Plan.of(texts, target), FOUR)


def test_an_unknown_unit_is_named_with_what_there_is() -> None:
    for unit in ("decoder.4", "encoder.0", "decoder.1.cross_attention"):
        reason = refusal([unit])
        assert f"unit {unit} is not in this paper model" in reason
        assert "decoder.0 to decoder.3, each with attention and mlp" in reason


def test_pinned_units_are_refused_with_their_reason() -> None:
    pinned = outline(4, pinned={"decoder.2.mlp": "its output is shared"})
    assert refusal(["decoder.2.mlp"], pinned) == "unit decoder.2.mlp cannot be dropped: its output is shared"


def test_a_family_that_a_target_cannot_carry() -> None:
    barred = outline(4, refused={Target.UNIFORM: "blocks are not alike"})
    expected = "target uniform is not possible for this paper model: blocks are not alike"
    assert refusal(["decoder.2"], barred, Target.UNIFORM) == expected
    check(Plan.of(["decoder.2"], Target.REMOTE), barred)


def test_uniform_takes_no_lone_sublayer() -> None:
    assert "unit decoder.2.mlp cannot be dropped for target uniform" in refusal(
        ["decoder.2.mlp"], target=Target.UNIFORM
    )


def test_deci_keeps_the_attention_of_the_first_block_that_is_left() -> None:
    check(Plan.of(["decoder.1.attention", "decoder.0.mlp"], Target.DECI), FOUR)
    assert "first block that is left" in refusal(["decoder.0.attention"], target=Target.DECI)
    assert "unit decoder.1.attention" in refusal(["decoder.0", "decoder.1.attention"], target=Target.DECI)


def test_one_block_must_stay() -> None:
    blocks = [f"decoder.{i}" for i in range(4)]
    assert refusal(blocks) == "the plan drops every block of decoder; at least one must stay"
    both = outline(stack(2, "encoder", causal=False), 2)
    assert "every block of encoder" in refusal(["encoder.0", "encoder.1"], both)


def test_one_attention_must_stay_where_positions_are_counted() -> None:
    attentions = [f"decoder.{i}.attention" for i in range(4)]
    assert "drops every attention of decoder" in refusal(attentions)
    assert "drops every attention of decoder" in refusal(["decoder.0", *attentions[1:]])
    check(Plan.of(f"encoder.{i}.attention" for i in range(3)), outline(stack(3, "encoder", causal=False)))


def test_a_stack_that_must_not_get_shorter_than_another() -> None:
    both = outline(stack(3, "encoder", causal=False), 3, not_shorter={"encoder": "decoder"})
    assert refusal(["encoder.1"], both).startswith("the plan leaves encoder with fewer blocks than decoder")
    check(Plan.of(["decoder.1"]), both)
    check(Plan.of(["decoder.1", "encoder.1"]), both)


def test_a_block_whose_sublayers_all_go_is_a_dropped_block() -> None:
    pair = drops("decoder.1.attention", "decoder.1.mlp")
    assert normalise(pair, FOUR) == drops("decoder.1")
    assert normalise(drops("decoder.1", "decoder.1.mlp"), FOUR) == drops("decoder.1")
    assert normalise(pair, outline(stack([block(rest=4)] * 3))) == pair, "what acts on the stream itself stays"
    assert normalise(pair, outline(4, pinned={"decoder.1": "holds the positions"})) == pair


@given(st.frozensets(st.sampled_from([a for a, _ in FOUR.blocks()] + [a for a, _ in FOUR.sublayers()])))
def test_normalising_is_idempotent_and_keeps_what_is_gone(chosen: frozenset[Address]) -> None:
    def gone(of: frozenset[Address]) -> set[Address]:
        return {a for a, _ in FOUR.sublayers() if a in of or a.parent in of}

    short = normalise(chosen, FOUR)
    assert normalise(short, FOUR) == short
    assert gone(short) == gone(chosen)


def test_units_of_a_kind() -> None:
    assert len(units(FOUR, "block")) == 4
    assert len(units(FOUR, "sublayer")) == 8
    assert units(FOUR, "mlp") == [Address("decoder", i, "mlp") for i in range(4)]
    assert units(FOUR, "sublayer", Target.UNIFORM) == []
    assert Address("decoder", 0, "attention") not in units(FOUR, "attention", Target.DECI)
    assert len(units(FOUR, "block", Target.DECI)) == 4
    assert Address("decoder", 2) not in units(outline(4, pinned={"decoder.2": "no"}), "block")


def test_blocks_may_lack_a_sublayer() -> None:
    uneven = outline(stack([block(), BlockOutline(sublayers={"attention": attention()})]))
    assert [str(a) for a in units(uneven, "mlp")] == ["decoder.0.mlp"]
    assert "decoder.1.mlp is not in this" in refusal(["decoder.1.mlp"], uneven)
    assert normalise(drops("decoder.1.attention"), uneven) == drops("decoder.1")


def test_survivors_keep_their_original_numbers() -> None:
    assert survivors(drops("decoder.1", "decoder.2.mlp"), FOUR, "decoder") == [0, 2, 3]
