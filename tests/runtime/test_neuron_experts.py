"""One expert a token for all blocks: which one, what it computes, what is saved, and how experts are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from running import GENERATING, drawn_experts, equal, generate, ready, state
from test_rules import IDS
from torch import Tensor, nn

from billhook.anatomy import Anatomy, discover
from billhook.data import Windows
from billhook.evaluate.policy_quality import Judge
from billhook.measure.cost import CostModel
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep
from billhook.runtime.catalogue import policy_of, write_policy
from billhook.runtime.fewer_neurons import Route, neurons_of
from billhook.runtime.neuron_experts import NeuronExperts
from billhook.runtime.pre_gating import Experts, find_experts

WITH_NEURONS = [name for name in GENERATING if neurons_of(discover(FAMILIES[name].build()))]


def masked(model: nn.Module, anatomy: Anatomy, policy: NeuronExperts, experts: Tensor) -> list[Any]:
    """Hooks that silence the neurons that each token's expert does not keep."""
    handles = []
    for address, inner in neurons_of(anatomy).items():
        write = next(s for s in inner.slices if s.writes).parameter.rpartition(".")[0]
        order = policy.tensors()[f"{address}.worth"].argsort(dim=1, descending=True)
        mask = torch.zeros(order.shape).scatter_(1, order[:, : round(policy.keep * inner.count)], 1.0)[experts]

        def silence(module: nn.Module, args: Any, mask: Tensor = mask) -> Any:
            return (args[0] * mask.reshape(args[0].shape),)

        handles.append(model.get_submodule(write).register_forward_pre_hook(silence))
    return handles


@pytest.mark.parametrize("name", WITH_NEURONS)
@torch.no_grad()
def test_each_token_runs_the_neurons_of_its_expert_alone(name: str) -> None:
    """As the plain model with the others' activations at zero."""
    family = FAMILIES[name]
    model = family.build()
    anatomy = discover(model)
    inputs = family.inputs(model, 2, "left" if family.pads else None)
    policy = drawn_experts(anatomy, keep=0.5)
    streams: list[Tensor] = []
    block = model.get_submodule(anatomy.stack("decoder").blocks[0].path)
    handle = block.register_forward_pre_hook(lambda module, args, kwargs: streams.append(args[0]), with_kwargs=True)
    model(**inputs)
    handle.remove()
    (stream,) = streams
    router = policy.tensors()
    x = stream / stream.square().mean(-1, keepdim=True).sqrt()
    experts = torch.stack([x @ w + b for w, b in zip(router["router.weight"], router["router.bias"], strict=True)])
    experts = experts.argmax(0)
    assert len(experts.unique()) > 1
    handles = masked(model, anatomy, policy, experts)
    wanted = model(**inputs).logits
    for handle in handles:
        handle.remove()
    with policy.attach(model, anatomy):
        found = model(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-3)


def test_what_is_left_out_is_not_computed() -> None:
    model, anatomy, prompt = ready("llama")
    widths: list[int] = []
    with drawn_experts(anatomy, keep=0.25).attach(model, anatomy) as attached, torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[-1]))
        model(**prompt)
    assert widths == [12] * 5
    tokens = prompt["input_ids"].numel()
    assert set(attached.counts.picked.values()) == {48 * tokens}
    assert set(attached.counts.left_out.values()) == {36 * tokens}


def test_the_work_is_that_of_a_model_with_so_many_neurons() -> None:
    model, anatomy, _ = ready("llama_bias")
    windows = Windows.of(IDS, "text")
    _, saved = Judge(model, anatomy, windows)(drawn_experts(anatomy, keep=0.75))
    costs = CostModel(anatomy.outline, prompt_tokens=1, new_tokens=windows.ids.shape[1])
    keeps = [Keep(unit=address, inner="neuron", indices=tuple(range(36))) for address in neurons_of(anatomy)]
    assert saved.flops == pytest.approx(costs.of((), keeps)["flops"] / costs.dense["flops"])
    assert (saved.flops < 1) and saved.kv_bytes == 1 and saved.blocks == 5
    assert len(saved.sublayers) == 5


def two_kinds() -> nn.Module:
    """Tokens below 50 use the first half of the neurons of every MLP, the others the second half."""
    model = build("llama")
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:50, 5] = 300.0
        table[50:, 5] = -300.0
        model.model.norm.weight *= 50
        model.model.norm.weight[5] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[5] = 0
            layer.mlp.down_proj.weight[5] = 0
            layer.post_attention_layernorm.weight[5] = 1.0
            layer.mlp.gate_proj.weight[:] = 0
            layer.mlp.gate_proj.weight[:24, 5] = 2.0  # silu: nothing where the channel is negative
            layer.mlp.gate_proj.weight[24:, 5] = -2.0
    return model


def text(rows: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (rows, 12), generator=torch.Generator().manual_seed(seed))


def test_experts_are_the_neurons_that_kinds_of_tokens_use() -> None:
    model = two_kinds()
    anatomy, windows = discover(model), Windows.of(text(6), "text")
    before = state(model)
    policy = NeuronExperts(keep=0.5, experts=2).fitted(model, anatomy, windows)
    assert state(model) == before
    assert policy == NeuronExperts(keep=0.5, experts=2).fitted(model, anatomy, windows)
    assert policy.fitted(model, anatomy, Windows.of(text(3), "other")) is policy
    experts = Experts.of(policy.tensors())
    for address in neurons_of(anatomy):
        assert sorted(experts.kept(address, 0.5).tolist()) == [list(range(24)), list(range(24, 48))]
    judge = Judge(model, anatomy, Windows.of(text(4, seed=2), "held back"))
    assert judge(policy)[0].kl.value < 1e-4
    whole = NeuronExperts(keep=1.0, experts=2).fitted(model, anatomy, windows)
    assert whole.turned(0.75) == NeuronExperts(keep=0.75, experts=2).fitted(model, anatomy, windows)
    alone = NeuronExperts(keep=0.5, experts=1).fitted(model, anatomy, windows)
    assert judge(alone)[0].kl.value > 0.1


@torch.no_grad()
def test_worth_is_what_neurons_write_for_the_tokens_of_a_group() -> None:
    """One expert: the root mean square of activation times the norm of the column, over all tokens."""
    for name in ("llama", "gpt2"):
        model = build(name)
        anatomy, ids = discover(model), text(3)
        neurons = neurons_of(anatomy)
        seen: dict[Address, Tensor] = {}
        handles = []

        def note(address: Address, seen: dict[Address, Tensor] = seen) -> Any:
            return lambda module, args: seen.update({address: args[0]})

        for address, inner in neurons.items():
            write = model.get_submodule(next(s for s in inner.slices if s.writes).parameter.rpartition(".")[0])
            handles.append(write.register_forward_pre_hook(note(address)))
        model(ids)
        for handle in handles:
            handle.remove()
        found = find_experts(model, anatomy, neurons, Windows.of(ids, "text"), count=1, keep=0.5)
        for address, inner in neurons.items():
            weight = model.get_parameter(next(s for s in inner.slices if s.writes).parameter)
            norms = weight.norm(dim=0 if weight.shape[1] == inner.count else 1)
            worth = seen[address].flatten(0, 1).square().mean(0).sqrt() * norms
            torch.testing.assert_close(found.worth[address][0], worth, atol=1e-5, rtol=1e-4)
            best = worth.argsort(descending=True)[: inner.count // 4]
            assert found.kept(address, 0.25)[0].tolist() == sorted(best.tolist())


def test_a_group_without_tokens_gets_the_experts_of_all() -> None:
    """One kind of token and three experts to find: each keeps what is used most."""
    model = build("llama")
    anatomy = discover(model)
    ids = torch.full((2, 6), 7)
    found = find_experts(model, anatomy, neurons_of(anatomy), Windows.of(ids, "text"), count=3, keep=0.5)
    one = find_experts(model, anatomy, neurons_of(anatomy), Windows.of(ids, "text"), count=1, keep=0.5)
    for address, worth in found.worth.items():
        torch.testing.assert_close(worth, one.worth[address].expand(3, -1))


def test_the_last_tokens_of_a_pass_have_their_experts() -> None:
    route = Route()
    route.set(torch.tensor([[0, 2, 1], [0, 0, 2]]))
    assert [(e, w.tolist()) for e, w in route.groups(6) if w is not None] == [(0, [0, 3, 4]), (1, [2]), (2, [1, 5])]
    assert [(e, w.tolist()) for e, w in route.groups(4) if w is not None] == [(0, [2]), (1, [1]), (2, [0, 3])]
    route.set(torch.tensor([[1, 1]]))
    assert route.groups(2) == [(1, None)]
    for count in (3, 4):
        with pytest.raises(InputError, match=f"{count} tokens reached an MLP"):
            route.groups(count)


def test_written_with_its_experts_and_turned(tmp_path: Path) -> None:
    model, anatomy, prompt = ready("llama")
    policy = drawn_experts(anatomy, keep=0.5)
    write_policy(policy, tmp_path / "p.json", {})
    again = policy_of(str(tmp_path / "p.json"))
    assert again == policy != drawn_experts(anatomy, keep=0.25)
    with policy.attach(model, anatomy):
        wanted = generate(model, prompt)
    with policy.turned(0.25).turned(0.5).attach(model, anatomy):
        assert equal(generate(model, prompt), wanted)
    with policy.turned(0.0).attach(model, anatomy) as attached:
        assert not equal(generate(model, prompt), wanted)
    assert set(attached.counts.left_out.values()) == {47 * (2 * 9 + 4 * 2)}  # one neuron stays


def test_what_is_refused() -> None:
    llama, found = build("llama"), drawn_experts(discover(build("llama")), keep=0.5).tensors()
    with pytest.raises(InputError, match="no MLP whose neurons are understood"):
        NeuronExperts(keep=1.0).attach(build("mixtral"))
    with pytest.raises(InputError, match="needs experts found on text"):
        NeuronExperts().attach(llama)
    with pytest.raises(InputError, match="it has 3 experts of 240 neurons, for a stream of 36; asked are 3"):
        NeuronExperts(experts=3).with_tensors(found).attach(build("qwen3"))
    with pytest.raises(InputError, match="asked are 4"):
        NeuronExperts(experts=4).with_tensors(found).attach(llama)
    name = "decoder.2.mlp.worth"
    for wrong in (
        {},
        {k: v for k, v in found.items() if k != "router.bias"},
        {k: v for k, v in found.items() if k != "router.weight"},
        found | {name: found[name][:2]},
        found | {name: found[name][0]},
        found | {"router.weight": found["router.weight"][1:]},
        found | {"decoder.2.mlp.mean": found[name]},
    ):
        with pytest.raises(InputError, match=r"its tensors must be router.weight"):
            NeuronExperts(experts=3).with_tensors(wrong)
    with pytest.raises(InputError, match="parameter keep"):
        policy_of("neuron-experts:keep=1.5")
    windows = Windows.of(text(2), "text")
    with pytest.raises(InputError, match="which no encoder-decoder does"):
        NeuronExperts().fitted(build("t5"), discover(build("t5")), windows)
    with pytest.raises(InputError, match="25 experts are found on as many tokens or more, not on 24"):
        NeuronExperts(experts=25).fitted(llama, discover(llama), windows)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"activations of decoder.1.mlp are not finite"):
        NeuronExperts().fitted(llama, discover(llama), windows)
    assert "forward" not in vars(llama.model.layers[0])
