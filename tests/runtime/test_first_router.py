"""A route is decided by the prompt and holds for the sequence: what is left out, which keys and values there are, and
routers that learn which blocks do nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import build
from running import GENERATING, equal, for_one_kind, generate, ready
from test_rules import IDS, decoded, replaced
from torch import Tensor, nn

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.data.decoding import forward
from billhook.evaluate.policy_quality import Judge
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.catalogue import policy_of, write_policy
from billhook.runtime.first_router import FirstRouter
from billhook.runtime.routers import Routers, routable, train_routers, without_entries


def leaving(blocks: int, hidden: int, out: list[int], threshold: float = 0.5) -> FirstRouter:
    """Leaves out these blocks, whatever the prompt."""
    bias = torch.tensor([-9.0 if i in out else 9.0 for i in range(blocks)])
    return FirstRouter(threshold=threshold).with_tensors({"w": torch.zeros(blocks, hidden), "b": bias})


@pytest.mark.parametrize("name", GENERATING)
def test_decoded_tokens_step_around_a_block_that_read_the_prompt(name: str) -> None:
    """As the plain model whose block hands on the stream as it came in for all but the prompt."""
    model, anatomy, prompt = ready(name)
    stack = anatomy.outline.stack("decoder")
    index = routable(anatomy)[-1]
    block = anatomy.stack("decoder").blocks[index]
    with leaving(len(stack.blocks), stack.hidden_size, [index]).attach(model, anatomy) as attached:
        under = generate(model, prompt)
    with replaced(model, block.path, lambda into, out, call: into if call else out):
        assert equal(under, generate(model, prompt))
    rows = next(iter(prompt.values())).shape[0]
    assert attached.counts.skipped == {sub.address: 4 * rows for sub in block.sublayers}  # 4 of 5 tokens are read back
    attention = Address("decoder", index, "attention")
    written = index not in without_entries(anatomy) and stack.blocks[index].sublayers["attention"].cache_width > 0
    assert attached.counts.projected.get(attention, 0) == (4 * rows if written else 0)
    assert len(attached.counts.projected) <= 1


def test_a_block_left_out_has_the_prompts_entries_alone() -> None:
    model = build("llama")
    anatomy = discover(model)
    with leaving(5, 36, [2, 4]).attach(model, anatomy) as attached, torch.no_grad():
        cache = forward(model, IDS[:, :4])[1]
        forward(model, IDS[:, 4:5], cache)
        forward(model, IDS[:, 5:], cache)  # two at once: the route holds
    assert [layer.keys.shape[2] for layer in cache.layers] == [7, 7, 4, 7, 4]
    assert attached.counts.skipped == {Address("decoder", i, kind): 6 for i in (2, 4) for kind in ("attention", "mlp")}
    _, saved = Judge(model, anatomy, Windows.of(IDS, "text"))(leaving(5, 36, [2, 4]))
    assert saved.kv_bytes == pytest.approx(3 / 5)


def test_the_route_goes_where_the_cache_goes() -> None:
    """A copy of a filled cache, finished under the policy put on anew; a cache of another sequence has its own."""
    model = build("llama")
    anatomy = discover(model)
    policy = leaving(5, 36, [2])
    with policy.attach(model, anatomy), torch.no_grad():
        whole = decoded(model, IDS)
        cache = forward(model, IDS[:, :3])[1]
        other = leaving(5, 36, [2], threshold=0)
    copied = copy.deepcopy(cache)
    with other.attach(model, anatomy), torch.no_grad():
        fresh = forward(model, IDS[:, :3])[1]
        for place in range(3, 7):
            found = forward(model, IDS[:, place : place + 1], copied)[0]
            plain = forward(model, IDS[:, place : place + 1], fresh)[0]
    assert torch.equal(found[:, 0], whole[:, -1])
    assert not torch.allclose(plain, found)


def test_each_row_has_its_own_route_and_padding_is_not_read() -> None:
    """Row 0 leaves out block 1, row 1 does not: what decides is the mean over real tokens of the normed stream."""
    model = build("llama")
    anatomy = discover(model)
    seen: list[Tensor] = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    with torch.no_grad():
        model(IDS, attention_mask=mask)
    handle.remove()
    normed = seen[0] / seen[0].square().mean(-1, keepdim=True).sqrt()
    means = torch.stack([normed[0].mean(0), normed[1, 2:].mean(0)])
    weight = torch.zeros(5, 36)
    weight[1] = means[1] - means[0]
    bias = torch.full((5,), 9.0)
    bias[1] = -(means @ weight[1]).mean()
    routers = Routers(weight, bias)
    for rows in (slice(0, 2), slice(1, 2)):
        worth = routers.worth(1, seen[0][rows], mask[rows].bool())
        torch.testing.assert_close(worth, (means[rows] @ weight[1] + bias[1]).sigmoid())
    policy = FirstRouter().with_tensors({"w": weight, "b": bias})
    prompt = {"input_ids": IDS, "attention_mask": mask}
    plain = generate(model, prompt)
    with policy.attach(model, anatomy) as attached:
        _, logits = generate(model, prompt)
        with pytest.raises(InputError, match="beam search"):
            model.generate(**prompt, num_beams=2)
    torch.testing.assert_close(logits[:, 1], plain[1][:, 1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[1:, 0], plain[1][1:, 0])
    # the four tokens of row 0 that are read back: their keys and values alone are made
    assert attached.counts.skipped == {Address("decoder", 1, kind): 4 for kind in ("attention", "mlp")}
    assert attached.counts.projected == {Address("decoder", 1, "attention"): 4}


@pytest.mark.parametrize("cache", [None, "static"])
def test_padding_does_not_decide_in_any_form_of_a_mask(cache: str | None) -> None:
    """A static cache comes with a mask of queries and keys. Block 1 would go if padding were read, and stays."""
    model = build("llama")
    anatomy = discover(model)
    seen: list[Tensor] = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask = torch.tensor([[0, 0, *[1] * (IDS.shape[1] - 2)]])
    with torch.no_grad():
        model(IDS[1:], attention_mask=mask)
    handle.remove()
    (normed,) = seen[0] / seen[0].square().mean(-1, keepdim=True).sqrt()
    real, whole = normed[2:].mean(0), normed.mean(0)
    weight, bias = torch.zeros(5, 36), torch.full((5,), 9.0)
    weight[1] = 100 * (real - whole)
    bias[1] = -weight[1] @ (real + whole) / 2
    policy = FirstRouter().with_tensors({"w": weight, "b": bias})
    with policy.attach(model, anatomy) as attached:
        generate(model, {"input_ids": IDS[1:], "attention_mask": mask}, cache_implementation=cache)
    assert not attached.counts.skipped


def test_the_first_block_of_each_kind_of_cache_and_those_that_others_read_have_entries() -> None:
    for name in ("llama", "gemma3", "gemma4"):
        anatomy = discover(build(name))
        windows = [b.sublayers["attention"].window for b in anatomy.outline.stack("decoder").blocks]
        firsts = {windows.index(window) for window in windows}
        pinned = {Address.parse(unit).block for unit in anatomy.outline.pinned}
        assert without_entries(anatomy) == set(range(len(windows))) - firsts - pinned


def quietened(blocks: tuple[int, ...]) -> nn.Module:
    model = build("llama")
    for layer in (model.model.layers[i] for i in blocks):
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return model


def test_routers_learn_which_blocks_write_nothing() -> None:
    """Two of the four that may go write nothing: at half of them kept, these go, and the text stays as it is."""
    model = quietened((2, 3))
    model.model.norm.weight.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    wanting = [weight.requires_grad for weight in model.parameters()]
    ids = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(0))
    windows = Windows.of(ids, "text")
    routers = train_routers(model, discover(model), windows, keep=0.5, steps=80)
    assert torch.equal(routers.weight, train_routers(model, discover(model), windows, keep=0.5, steps=80).weight)
    worth = routers.bias.sigmoid()
    assert max(worth[2], worth[3]) < min(worth[1], worth[4])
    assert worth[1:].mean() == pytest.approx(0.5, abs=0.1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert wanting == [weight.requires_grad for weight in model.parameters()]
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    with pytest.raises(InputError, match="windows of 8 or more"):
        train_routers(model, discover(model), Windows.of(ids[:, :7], "text"), keep=0.5, steps=1)


def test_routers_learn_to_read_the_prompt() -> None:
    """A block that writes only where a token of one kind was read is worth more to prompts of that kind."""
    model = for_one_kind()
    generator = torch.Generator().manual_seed(1)
    low = torch.randint(3, 50, (8, 16), generator=generator)
    high = torch.randint(50, 90, (8, 16), generator=generator)
    windows = Windows.of(torch.stack([low, high], dim=1).flatten(0, 1), "text")
    routers = train_routers(model, discover(model), windows, keep=0.75, steps=150)
    seen: list[Tensor] = []
    handle = model.model.layers[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.cat([low, high]))
    handle.remove()
    worth = routers.worth(3, seen[0], None)
    assert worth[:8].mean() > worth[8:].mean() + 0.05


def test_written_with_its_routers_and_refused_on_another_model(tmp_path: Path) -> None:
    policy = leaving(5, 36, [2])
    write_policy(policy, tmp_path / "p.json", {})
    again = policy_of(str(tmp_path / "p.json"))
    assert again == policy
    assert all(torch.equal(tensor, policy.tensors()[name]) for name, tensor in again.tensors().items())
    assert again != leaving(5, 36, [3]) and again != FirstRouter(threshold=policy.threshold)
    assert again.turned(0.2).tensors().keys() == {"w", "b"}
    model = build("gpt2")
    with pytest.raises(InputError, match="its routers are for 5 blocks of width 36"):
        again.attach(model)
    with pytest.raises(InputError, match="needs routers trained on text"):
        FirstRouter().attach(model)
    with pytest.raises(InputError, match=r"w \[blocks, hidden\]"):
        FirstRouter().with_tensors({"w": torch.zeros(5)})
