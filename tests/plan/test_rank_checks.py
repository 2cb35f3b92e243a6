"""Which linears a plan may take apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from families import build

from billhook.anatomy import discover
from billhook.plan.address import Address
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Factorise, Keep, Plan, Sparsify
from billhook.plan.ranks import check_factors
from billhook.plan.target import Target
from billhook.surgery.ranks import read_ranks, write_ranks

ANATOMY = discover(build("qwen3_moe"))
UNIT = Address("decoder", 1, "mlp")  # a dense one; that of block 0 is a mixture


def apart(rank: int = 3, linear: str = "mlp.up_proj", unit: Address = UNIT) -> Plan:
    return Plan().factorised({Factorise(unit=unit, linear=linear, rank=rank): np.zeros((48, rank), np.float32)})


def test_a_plan_with_a_basis_is_possible_and_reads_back() -> None:
    plan = apart()
    check(plan, ANATOMY.outline)
    assert Plan.loads(plan.dumps()) == plan
    assert list(plan.arrays) == ["decoder.1.mlp/mlp.up_proj/basis"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (apart(unit=Address("decoder", 9, "mlp")), "decoder.9.mlp is no sublayer"),
        (
            apart(unit=Address("decoder", 0, "mlp")),
            r"mlp.up_proj of decoder.0.mlp cannot be taken apart; those that can are mlp.experts",
        ),
        (
            apart(linear="mlp.gate"),
            r"mlp.gate of decoder.1.mlp cannot be taken apart; those that can are mlp.gate_proj,",
        ),
        (apart(rank=20), "rank 20 saves nothing; two linears are smaller than one from rank 1 to 19"),
        (apart().model_copy(update={"edits": apart().edits * 2}), "takes mlp.up_proj of decoder.1.mlp apart twice"),
        (apart().model_copy(update={"target": Target.UNIFORM}), "target uniform cannot carry linears in two parts"),
        (apart().model_copy(update={"target": Target.DECI}), "target deci"),
        *(
            (apart().model_copy(update={"edits": (edit, *apart().edits)}), message)
            for edit, message in (
                (Plan.of([UNIT]).edits[0], "decoder.1.mlp is dropped, so mlp.up_proj cannot be taken apart"),
                (Plan.of(["decoder.1"]).edits[0], "decoder.1.mlp is dropped"),
                (Keep(unit=UNIT, inner="neuron", indices=(0, 1)), "both kept in part and taken apart"),
            )
        ),
    ],
)
def test_what_is_not_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(plan, ANATOMY.outline)


def test_zeros_would_not_survive() -> None:
    sparse = Sparsify(unit=UNIT, zeros={"mlp.up_proj.weight": 1})
    plan = Plan.of([], sparsities=[sparse]).factorised({apart().factors[0]: np.zeros((48, 3), np.float32)})
    with pytest.raises(InputError, match="both made sparse and taken apart"):
        check_factors(plan, (), ANATOMY.outline)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"decoder": 3}, "linear_ranks is not a map"),
        ({"decoder": {"0": {"mlp.up_proj": "x"}}}, "linear_ranks is not a map"),
        ({"decoder": {"9": {"mlp.up_proj": 3}}}, "gives mlp.up_proj of decoder.9 rank 3"),
        ({"decoder": {"0": {"mlp.up_proj": 0}}}, "rank 0"),
    ],
)
def test_a_config_that_lists_something_else_is_refused(table: dict[str, Any], message: str) -> None:
    model: Any = build("llama")
    anatomy = discover(model)
    write_ranks(model.config, anatomy, {(Address("decoder", 2), "mlp.up_proj"): 3})
    assert read_ranks(model.config, anatomy) == {(Address("decoder", 2), "mlp.up_proj"): 3}
    model.config.linear_ranks = table
    with pytest.raises(InputError, match=message):
        read_ranks(model.config, anatomy)
