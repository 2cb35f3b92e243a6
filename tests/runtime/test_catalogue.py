"""Policies by name: read, refused with a reason, written and read back."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

from billhook.plan.errors import InputError
from billhook.runtime.catalogue import POLICIES, policy_of, read_policy, write_policy
from billhook.runtime.lora_drop import LoraDrop
from billhook.runtime.numbers import read_numbers, write_numbers


@pytest.mark.parametrize("name", POLICIES)
def test_each_says_what_becomes_of_keys_and_values_and_what_it_keeps(name: str) -> None:
    text = inspect.getdoc(POLICIES[name]) or ""
    assert "Keys and values:" in text
    assert "State:" in text
    assert POLICIES[name].kv
    assert policy_of(name).name == name


def test_parameters_are_read_and_checked() -> None:
    policy = policy_of("ffn-skip:threshold=0.9, span=3")
    assert (policy.threshold, policy.span) == (0.9, 3)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("skip", "there is no policy 'skip'; there are static-skip"),
        ("ffn-skip:thresh=1", "has no parameter thresh; it has threshold"),
        ("ffn-skip:threshold=2", "parameter threshold"),
        ("ffn-skip:threshold", "not of the form parameter=value"),
        ("ffn-skip:span=1,span=2", "gives span twice"),
        ("nowhere.json", "cannot be read"),
    ],
)
def test_bad_words_get_one_line(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        policy_of(text)


def test_a_file_round_trips_with_its_tensors(tmp_path: Path) -> None:
    tensors = {"decoder.2.A": torch.ones(4, 1), "decoder.2.B": torch.arange(4.0)[None]}
    policy = LoraDrop(rank=1, blocks="2").with_tensors(tensors)
    write_policy(policy, tmp_path / "p.json", {"target": "kl<=1"})
    again = policy_of(str(tmp_path / "p.json"))
    assert again == policy
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in tensors.items())
    stored = (tmp_path / "p.safetensors").read_bytes()
    for other in (stored[:-1] + bytes([stored[-1] ^ 1]), None):
        (tmp_path / "p.safetensors").unlink()
        if other is not None:
            (tmp_path / "p.safetensors").write_bytes(other)
        with pytest.raises(InputError, match=r"p\.safetensors"):
            read_policy(tmp_path / "p.json")
    broken = policy.with_tensors({**tensors, "decoder.2.A": torch.full((4, 1), torch.nan)})
    write_policy(broken, tmp_path / "p.json", {})
    with pytest.raises(InputError, match=r"p\.safetensors holds values that are not finite"):
        read_policy(tmp_path / "p.json")
    write_policy(policy_of("chain"), tmp_path / "p.json", {})
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize(
    "content", ["[1]", "{}", '{"policy": "chain", "code": 1}', '{"policy": "chain", "parameters": 3}']
)
def test_a_file_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"p.json"):
        read_policy(path)
    path.write_text(json.dumps({"policy": "chain", "parameters": {"blocks": "0-1"}}))
    assert read_policy(path) == policy_of("chain:blocks=0-1")


def test_numbers_are_read_as_written() -> None:
    assert read_numbers("0-2+2+5+4-3") == [0, 1, 2, 2, 5, 4, 3]
    assert write_numbers([0, 1, 2, 2, 5, 4, 3]) == "0-2+2+5+4+3"
    assert read_numbers(write_numbers([3, 3, 3, 0])) == [3, 3, 3, 0]
    with pytest.raises(InputError, match="neither a block number"):
        read_numbers("0..3")
