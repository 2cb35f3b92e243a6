import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.plan.budget import Budget, realised, within
from billhook.plan.errors import InputError

DENSE = {"params": 100e6, "size": 300e6, "memory": 310e6, "flops": 2e12, "kv_bytes": 4096.0, "blocks": 30.0}


@pytest.mark.parametrize(
    ("text", "ceilings"),
    [
        ("params=0.8", {"params": 80e6}),
        ("params=.8", {"params": 80e6}),
        ("params=80M", {"params": 80e6}),
        ("params=0.05b", {"params": 50e6}),
        ("size=100MB", {"size": 100e6}),
        ("size=100 MiB", {"size": 100 * 2**20}),
        ("flops=1.5T", {"flops": 1.5e12}),
        ("memory=200MB", {"memory": 200e6}),
        ("kv_bytes=2KiB", {"kv_bytes": 2048}),
        ("blocks=24", {"blocks": 24}),
        ("blocks=1", {"blocks": 1}),
        ("blocks=0.8", {"blocks": 24}),
        (" params=0.8 , kv_bytes = 0.5", {"params": 80e6, "kv_bytes": 2048}),
    ],
)
def test_amounts(text: str, ceilings: dict[str, float]) -> None:
    assert Budget.parse(text).ceilings(DENSE) == pytest.approx(ceilings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "budget '' is not of the form KIND=AMOUNT"),
        ("0.8", "is not of the form KIND=AMOUNT"),
        ("params=0.8,", "budget '' is not of the form KIND=AMOUNT"),
        ("params=", "'' is not an amount of params"),
        ("params=0", "is out of range; give a fraction of dense between 0 and 1 (0.8) or an absolute number (80M)"),
        ("params=1", "is out of range"),
        ("params=1.5", "is out of range"),
        ("params=80", "is out of range"),
        ("params=-3", "is out of range"),
        ("params=-0.5", "is out of range"),
        ("params=-3M", "is out of range"),
        ("params=0M", "is out of range"),
        ("params=nan", "'nan' is not an amount of params"),
        ("params=inf", "'inf' is not an amount of params"),
        ("params=80%", "'80%' is not an amount of params"),
        ("params=80MB", "'80MB' is not an amount of params"),
        ("params=１", "is not an amount of params"),
        ("size=100M", "'100M' is not an amount of size"),
        ("blocks=2.5", "is out of range; give a fraction of dense between 0 and 1 (0.8) or an absolute number (24)"),
        ("blocks=0", "is out of range"),
        ("blocks=1e999", "is out of range"),
        ("layers=0.8", "budget kind 'layers' is unknown; use params, size, memory, flops, kv_bytes, blocks or latency"),
        ("latency=1.2", "is out of range; give a fraction of the dense model's time between 0 and 1 (0.8)"),
        ("latency=30ms", "'30ms' is not an amount of latency; give a fraction of the dense model's time"),
        ("latency=0.8,params=0.9", "latency is measured, and stands alone"),
        ("params=0.8,params=0.7", "names params twice"),
        ("until=", "budget 'until=': until is written until=cliff, with no limit beside it"),
        ("until=dawn", "until is written until=cliff"),
        ("until=cliff,params=0.8", "with no limit beside it"),
        ("params=0.8, until = cliff", "with no limit beside it"),
    ],
)
def test_what_is_no_budget_gets_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Budget.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=20) | st.from_regex(r"(params|blocks|size)=[0-9.eMB+-]{0,8}", fullmatch=True))
def test_any_text_is_a_budget_or_an_input_error(text: str) -> None:
    try:
        ceilings = Budget.parse(text).ceilings(DENSE)
    except InputError:
        return
    assert all(0 < ceilings[kind] < DENSE[kind] for kind in ceilings)


def test_a_limit_that_the_dense_model_keeps_already() -> None:
    for text in ("params=100M", "size=2GB", "blocks=30"):
        with pytest.raises(InputError, match=f"budget {text} asks for no reduction: the dense model has"):
            Budget.parse(text).ceilings(DENSE)
    with pytest.raises(InputError, match="this model has no kv_bytes to reduce"):
        Budget.parse("kv_bytes=0.5").ceilings({**DENSE, "kv_bytes": 0.0})


def test_all_limits_must_hold() -> None:
    ceilings = Budget.parse("params=0.8,kv_bytes=0.5").ceilings(DENSE)
    assert within(80e6, ceilings["params"]) and not within(80e6 + 1, ceilings["params"])
    assert within(2048.0, ceilings["kv_bytes"]) and not within(2049.0, ceilings["kv_bytes"])


@given(st.integers(2, 300), st.integers(1, 10**7), st.data())
def test_a_whole_number_of_equal_blocks_keeps_its_own_fraction(blocks: int, params: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, blocks - 1))
    ceilings = Budget.parse(f"params={kept / blocks:.12f}").ceilings({"params": float(blocks * params)})
    assert within(float(kept * params), ceilings["params"])


def test_latency_is_for_those_who_measure() -> None:
    budget = Budget.parse("latency=0.8")
    assert budget.latency == 0.8 and str(budget) == "latency=0.8"
    assert Budget.parse("params=0.8").latency is None
    with pytest.raises(
        InputError, match=r"budget latency=0\.8 is measured, which only compress does; use params, size"
    ):
        budget.ceilings(DENSE)


def test_realised_fractions() -> None:
    assert realised({"params": 80.0, "kv_bytes": 0.0}, {"params": 100.0, "kv_bytes": 0.0}) == {"params": 0.8}


@given(st.sampled_from(["params=0.8", "size=100MB,blocks=0.5", "blocks=24"]))
def test_text_and_back(text: str) -> None:
    assert str(Budget.parse(text)) == text
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


@pytest.mark.parametrize("text", ["until=cliff", " until = cliff "])
def test_until_the_cliff_is_no_limit(text: str) -> None:
    budget = Budget.parse(text)
    assert budget.until_cliff and budget.limits == ()
    assert str(budget) == "until=cliff"
    assert Budget.parse(str(budget)) == budget
    assert budget.ceilings(DENSE) == {}
    assert not Budget.parse("params=0.8").until_cliff
