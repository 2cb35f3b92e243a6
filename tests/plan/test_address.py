import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.plan.address import SUBLAYERS, Address
from billhook.plan.errors import InputError

addresses = st.builds(
    Address,
    st.sampled_from(["decoder", "encoder", "vision", "text_tower"]),
    st.integers(0, 999_999),
    st.sampled_from([None, *SUBLAYERS]),
)


@given(addresses)
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
