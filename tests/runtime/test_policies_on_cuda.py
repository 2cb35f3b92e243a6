"""Policies on a CUDA device, where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from running import GENERATING, equal, generate, ready, state
from test_every_policy import loud, quiet

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def moved(name: str) -> tuple[Any, Any, dict[str, Any]]:
    model, anatomy, prompt = ready(name)
    return model.to(DEVICE), anatomy, {key: tensor.to(DEVICE) for key, tensor in prompt.items()}


@pytest.mark.parametrize("name", GENERATING)
def test_a_policy_that_leaves_out_nothing_changes_nothing(name: str) -> None:
    model, anatomy, prompt = moved(name)
    before, plain = state(model), generate(model, prompt)
    for policy in quiet(anatomy):
        with policy.attach(model, anatomy):
            assert equal(generate(model, prompt), plain), policy
        assert state(model) == before


@pytest.mark.parametrize("name", GENERATING)
def test_a_policy_that_leaves_out_a_lot_runs(name: str) -> None:
    model, anatomy, prompt = moved(name)
    for policy in loud(anatomy):
        with policy.attach(model, anatomy):
            assert generate(model, prompt)[1].isfinite().all(), policy
