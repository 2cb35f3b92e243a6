"""The policies by name, in words on the command line and in files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from billhook.plan.errors import InputError
from billhook.runtime.chain import Chain
from billhook.runtime.even_skip import EvenSkip
from billhook.runtime.expert_skip import ExpertSkip
from billhook.runtime.ffn_skip import FfnSkip
from billhook.runtime.first_router import FirstRouter
from billhook.runtime.in_turns import Scheduled
from billhook.runtime.kv_share import KvShare
from billhook.runtime.lora_drop import LoraDrop
from billhook.runtime.mixture_of_depths import MixtureOfDepths
from billhook.runtime.neuron_experts import NeuronExperts
from billhook.runtime.policy import Policy
from billhook.runtime.self_speculation import SelfSpeculation
from billhook.runtime.similarity_exit import SimilarityExit
from billhook.runtime.static_skip import StaticSkip
from billhook.runtime.voids import Voids

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        StaticSkip, EvenSkip, Chain, FfnSkip, ExpertSkip, NeuronExperts, Voids, SimilarityExit, LoraDrop, FirstRouter,
        MixtureOfDepths, KvShare, Scheduled, SelfSpeculation,
    )
}  # fmt: skip


def named(name: str) -> type[Policy]:
    """The policy of that name. InputError with the list of names if there is none."""
    if name not in POLICIES:
        raise InputError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}, or give a .json file")
    return POLICIES[name]


def policy_of(text: str) -> Policy:
    """Read ``NAME``, ``NAME:parameter=value,parameter=value`` or the path of a policy file."""
    if text.endswith(".json"):
        return read_policy(text)
    name, _, rest = text.partition(":")
    parameters: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        key, sign, value = part.partition("=")
        if not sign or not key.strip():
            raise InputError(f"policy {text!r}: {part!r} is not of the form parameter=value")
        if key.strip() in parameters:
            raise InputError(f"policy {text!r} gives {key.strip()} twice")
        parameters[key.strip()] = value.strip()
    return named(name).of(parameters)


def read_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy in a file that ``write_policy`` made or that looks like one. InputError where it is anything else."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"policy file {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("parameters", {}), dict) or "policy" not in content:
        raise InputError(f'policy file {path} is not of the form {{"policy": NAME, "parameters": {{...}}}}')
    unknown = sorted(set(content) - {"policy", "parameters", "tuned", "tensors"})
    if unknown:
        raise InputError(f"policy file {path} has the unknown field {unknown[0]}")
    policy = named(str(content["policy"])).of(content.get("parameters", {}))
    if "tensors" not in content:
        return policy
    try:
        stored = beside(path).read_bytes()
        if hashlib.sha256(stored).hexdigest() != content["tensors"]:
            raise InputError(f"{beside(path)} is not the file that belongs to {path.name}; tune the policy again")
        tensors = load(stored)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{beside(path)} cannot be read: {error}") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise InputError(f"{beside(path)} holds values that are not finite; tune the policy again")
    return policy.with_tensors(tensors)


def write_policy(policy: Policy, path: Path, tuned: dict[str, Any]) -> None:
    """Write a policy and how it was found; tensors, where it has any, into a safetensors file of the same name, whose
    digest the policy's file holds: one that was left from before, or is missing, is noticed."""
    content = {"policy": policy.name, "parameters": policy.model_dump(mode="json"), "tuned": tuned}
    tensors = {name: tensor.float().contiguous() for name, tensor in policy.tensors().items()}
    if tensors:
        stored = save(tensors)
        content["tensors"] = hashlib.sha256(stored).hexdigest()
        _replace(beside(path), stored)
    _replace(path, (json.dumps(content, indent=2) + "\n").encode())
    if not tensors:
        beside(path).unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    """Written beside its place and renamed: never half-written."""
    fresh = path.with_name(f".{path.name}.part")
    fresh.write_bytes(content)
    fresh.replace(path)


def beside(path: Path) -> Path:
    return path.with_suffix(".safetensors")
