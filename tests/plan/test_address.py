import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.plan.address import INNER, SUBLAYERS, Address
from billhook.plan.errors import InputError

addresses = st.builds(
    Address,
    st.sampled_from(["decoder", "encoder", "vision", "text_tower"]),
    st.integers(0, 999_999),
    st.sampled_from([None, *SUBLAYERS]),
)


inner_units = st.builds(
    lambda kind, number, block: Address("decoder", block, INNER[kind][0], kind, number),
    st.sampled_from(sorted(INNER)),
    st.integers(0, 9_999_999),
    st.integers(0, 99),
)


@given(addresses | inner_units)
def test_text_and_back(address: Address) -> None:
    assert Address.parse(str(address)) == address


@given(st.text(max_size=30))
def test_any_text_is_an_address_in_its_one_spelling_or_an_input_error(text: str) -> None:
    try:
        assert str(Address.parse(text)) == text
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "decoder",
        "decoder.",
        "decoder.-1",
        "decoder.1.",
        "decoder.1.head",
        "decoder.1.mlp.neuron",
        "decoder.1.mlp.neuron.",
        "decoder.1.mlp.neuron.03",
        "decoder.1.neuron.3",
        "decoder.1.mlp.neuron.3.weight",
        "Decoder.1",
        " decoder.1",
        "decoder.1\n",
        "decoder.01",
        "decoder.１",
        "decoder." + "9" * 5000,
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InputError, match=r"is not of the form STACK\.BLOCK"):
        Address.parse(text)


def test_order_is_by_stack_then_number_then_sublayer() -> None:
    texts = ["decoder.2", "decoder.2.attention", "decoder.2.mlp", "decoder.10", "encoder.0.mlp"]
    assert [str(a) for a in sorted(map(Address.parse, reversed(texts)))] == texts


def test_parent_is_the_block() -> None:
    assert Address.parse("decoder.3.mlp").parent == Address("decoder", 3) == Address.parse("decoder.3").parent


def test_an_inner_unit_lies_in_a_sublayer_and_a_block() -> None:
    unit = Address.parse("decoder.12.mlp.neuron.511")
    assert (unit.inner, unit.number) == ("neuron", 511)
    assert unit.outer == Address.parse("decoder.12.mlp") and unit.parent == unit.outer.parent == Address("decoder", 12)
    texts = [
        "decoder.1",
        "decoder.1.attention",
        "decoder.1.attention.group.0",
        "decoder.1.mlp",
        "decoder.1.mlp.neuron.2",
    ]
    texts += ["decoder.1.mlp.neuron.10", "decoder.2"]
    assert [str(a) for a in sorted(map(Address.parse, reversed(texts)))] == texts
    for wrong in ("decoder.1.attention.neuron.3", "decoder.1.mlp.group.3", "decoder.1.mlp.head.3"):
        with pytest.raises(InputError, match="an inner unit is an"):
            Address.parse(wrong)
