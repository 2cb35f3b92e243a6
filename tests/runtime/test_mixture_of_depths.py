"""Tokens that step around a block: against the block computed whole, with work really saved, in prompts and while
generating; which blocks are converted; and routers that learn which tokens a block is for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from running import GENERATING, equal, for_one_kind, generate, ready, state
from test_rules import IDS, decoded
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.data import Windows
from billhook.data.decoding import forward
from billhook.evaluate.policy_quality import Judge
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.attention_rank import _ranks, attention_ranks
from billhook.runtime.catalogue import policy_of, write_policy
from billhook.runtime.depth_routers import DepthRouters, _tokens, kept_shares, train_depth_routers
from billhook.runtime.mixture_of_depths import MixtureOfDepths
from billhook.runtime.silence import stream_out, with_stream

TEXT = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(0))


def drawn(anatomy: Anatomy, blocks: str = "1-2", **settings: Any) -> MixtureOfDepths:
    """Drawn routers, whose scores spread about 0; a ratio of 1/2 is the level 0."""
    stack = anatomy.outline.stack("decoder")
    weight = torch.randn(len(stack.blocks), stack.hidden_size, generator=torch.Generator().manual_seed(2)) / 5
    levels = torch.linspace(-2, 2, 5).expand(len(weight), 5)
    policy = MixtureOfDepths(blocks=blocks, **({"decay": False} | settings))
    return policy.with_tensors({"w": weight, "levels": levels})


@contextmanager
def by_hand(model: Any, anatomy: Anatomy, policy: MixtureOfDepths, levels: dict[int, float]) -> Iterator[list[Tensor]]:
    """Each block computes all it does; what it hands on is then put together token by token. Yields who stepped
    around, block after block."""
    weight, around = policy.tensors()["w"], []

    def hook(block: int) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            x, y = args[0] if args else kwargs["hidden_states"], stream_out(out)
            score = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ weight[block]
            share = 1 + 0.2 * torch.tanh(score)[..., None]
            around.append(score < levels[block])
            return with_stream(out, torch.where(around[-1][..., None], share * x, x + share * (y - x)))

        return after

    with ExitStack() as stack:
        for block in levels:
            module = model.get_submodule(anatomy.stack("decoder").blocks[block].path)
            stack.callback(module.register_forward_hook(hook(block), with_kwargs=True).remove)
        yield around


@pytest.mark.parametrize("name", GENERATING)
def test_a_token_that_steps_around_a_block_leaves_keys_and_values_there(name: str) -> None:
    """In the padded prompt and while generating: as blocks that compute all, keys and values included, and whose output
    is thrown away where the score is below the level."""
    model, anatomy, prompt = ready(name)
    policy = drawn(anatomy)
    with policy.attach(model, anatomy) as attached:
        ids, logits = generate(model, prompt)
    with by_hand(model, anatomy, policy, {1: 0.0, 2: 0.0}) as around:
        expected_ids, expected = generate(model, prompt)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)
    assert 0 < sum(int(each.sum()) for each in around) < sum(each.numel() for each in around)
    for block in (1, 2):
        left = sum(int(each.sum()) for each in around[block - 1 :: 2])
        total = sum(each.numel() for each in around[block - 1 :: 2])
        for sub in anatomy.stack("decoder").blocks[block].sublayers:
            assert attached.counts.skipped[sub.address] == left
            assert attached.counts.ran[sub.address] == total - left
            assert attached.counts.projected.get(sub.address, 0) == (0 if sub.kind == "mlp" else left)


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gpt2", "opt", "t5_gated"])
def test_what_steps_around_is_not_computed(name: str) -> None:
    """Of a converted block every weight but those of keys, values and routers sees the tokens that run alone."""
    model, anatomy, prompt = ready(name)
    rows: dict[str, list[int]] = {}

    def counting(path: str) -> Any:
        original = model.get_submodule(path).forward

        def own(x: Tensor, *rest: Any) -> Any:
            rows.setdefault(path, []).append(x.numel() // x.shape[-1])
            return original(x, *rest)

        return own

    paths = {
        name.rpartition(".")[0]: sub.kind
        for sub in anatomy.stack("decoder").blocks[1].sublayers
        for name in (*sub.reads, *sub.writes)
    }
    for path in paths:
        vars(model.get_submodule(path))["forward"] = counting(path)
    with drawn(anatomy, "1").attach(model, anatomy) as attached, torch.no_grad():
        generate(model, prompt, max_new_tokens=1)
    ran = attached.counts.ran[Address("decoder", 1, "mlp")]
    assert 0 < ran < ran + attached.counts.skipped[Address("decoder", 1, "mlp")]
    whole = ("k_proj", "v_proj", "k", "v", "c_attn", "kv_a_proj_with_mqa", "gate")
    for path, seen in rows.items():
        leaf = path.rpartition(".")[2]
        assert sum(seen) == ran or (leaf in whole and sum(seen) > ran), path
        assert (sum(seen) == ran) == (leaf not in whole), path


def test_a_route_depends_on_nothing_after_or_beside_the_token() -> None:
    """Read at once, token by token, in two parts, or without a cache: the same logits."""
    model = build("llama")
    anatomy = discover(model)
    with drawn(anatomy, "1-4", decay=True).attach(model, anatomy), torch.no_grad():
        at_once, step_by_step = model(IDS, use_cache=False).logits, decoded(model, IDS, prompt=1)
        first, cache = forward(model, IDS[:, :3])
        second = forward(model, IDS[:, 3:], cache)[0]
        alone = model(IDS[1:]).logits
    for other in (step_by_step, torch.cat([first, second], dim=1)):
        torch.testing.assert_close(other, at_once, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, at_once[1:], atol=1e-4, rtol=1e-4)
    assert {layer.keys.shape[2] for layer in cache.layers} == {7}


def test_the_ratio_is_the_dial() -> None:
    """1 leaves nothing out, 0 sends every token around, and in between less is run the lower it is."""
    model = build("qwen3")
    anatomy = discover(model)
    judge, shares = Judge(model, anatomy, Windows.of(TEXT, "text")), []
    for ratio in (1.0, 0.8, 0.5, 0.2, 0.0):
        policy = drawn(anatomy, "1-4").turned(ratio)
        with policy.attach(model, anatomy) as attached, torch.no_grad():
            model(TEXT)
        shares.append(attached.counts.share_run(Address("decoder", 3, "mlp")))
        evidence, saved = judge(policy)
        assert (evidence.kl.value == 0) == (ratio == 1) and saved.kv_bytes == 1
    assert shares[0] == 1 and shares[-1] == 0 and shares == sorted(shares, reverse=True) and len(set(shares)) == 5
    assert saved.flops < 0.75


def test_tokens_of_images_alone() -> None:
    model, anatomy, prompt = ready("gemma3_image")
    policy = drawn(anatomy, "1-3", tokens="vision", ratio=0)
    before = state(model)
    with policy.attach(model, anatomy) as attached:
        under = generate(model, prompt)
        skipped = attached.counts.skipped[Address("decoder", 2, "mlp")]
        text = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        words = generate(model, text)
        with pytest.raises(InputError, match="tells images by input_ids"), torch.no_grad():
            model(inputs_embeds=model.get_input_embeddings()(IDS))
    assert skipped == 2 * 4  # four tokens of an image in each row of the prompt, and none of those generated
    assert equal(words, generate(model, text)) and not torch.allclose(under[1], generate(model, prompt)[1])
    assert state(model) == before
    blind = build("llama")
    with pytest.raises(InputError, match="reads text alone"):
        drawn(discover(blind), tokens="vision", ratio=1).attach(blind)
    with pytest.raises(InputError, match="input with images, and this has none"):
        MixtureOfDepths(tokens="vision", blocks="1").fitted(model, anatomy, Windows.of(TEXT, "text"))


def test_shares_fall_along_a_cosine_and_their_mean_is_the_ratio() -> None:
    for ratio in (0.0, 0.1, 0.5, 0.7, 1.0):
        for count in (1, 2, 5, 6):
            shares = kept_shares(count, ratio, decay=True)
            assert math.fsum(shares) / count == pytest.approx(ratio)
            assert shares == sorted(shares, reverse=True) and min(shares) >= 0 and max(shares) <= 1
            assert kept_shares(count, ratio, decay=False) == [ratio] * count
    assert kept_shares(4, 0.5, decay=True) == pytest.approx([1.0, 0.75, 0.25, 0.0])
    assert kept_shares(3, 0.9, decay=True) == pytest.approx([1.0, 0.9, 0.8])


def test_a_level_is_a_quantile_and_at_the_ends_scores_do_not_matter() -> None:
    routers = DepthRouters(torch.zeros(2, 4), torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 6.0]]))
    assert [routers.level(1, ratio) for ratio in (1.0, 0.75, 0.5, 0.25, 0.0)] == [1.0, 1.5, 2.0, 4.0, 6.0]
    model = build("llama")
    anatomy = discover(model)
    weight = drawn(anatomy).tensors()["w"]
    for levels, block in ((torch.full((5, 5), 9.0), 1), (torch.full((5, 5), -9.0), 3)):  # shares 1, 1/2 and 0
        policy = MixtureOfDepths(blocks="1-3").with_tensors({"w": weight, "levels": levels})
        with policy.attach(model, anatomy) as attached, torch.no_grad():
            model(IDS)
        assert attached.counts.share_run(Address("decoder", block, "mlp")) == (1 if block == 1 else 0)


def test_which_tokens_are_routed_and_which_are_learnt_from() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 7, 7, 5], [7, 7, 5, 6]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1]] * 2),
    }
    images, words = [[False, True, True, False], [False, True, False, False]], [[False] * 3 + [True], [False] * 2]
    routed, told = _tokens(batch, (7,), True)
    assert routed.tolist() == images
    assert told.tolist() == [words[0], [*words[1], True, True]]
    assert _tokens(batch, (7,), False)[0].tolist() == [[False, True, True, True]] * 2


def test_the_rank_of_a_map() -> None:
    """Of one that attends to the first token alone 1, of one where each token attends to itself all of them; padding
    does not count."""
    first, own = torch.zeros(6, 6), torch.eye(6)
    first[:, 0] = 1
    maps = torch.stack([first, own, torch.block_diag(first[:3, :3], own[:3, :3])])[None]
    assert _ranks(maps, None).tolist() == [[1, 6, 4]]
    assert _ranks(own + 1e-3 * first, None).tolist() == 6
    assert _ranks(first + 1e-3 * own, None).tolist() == 1
    assert _ranks(maps, torch.tensor([[0, 0, 1, 1, 1, 1]])).tolist() == [[0, 4, 3]]


@pytest.mark.parametrize("name", [name for name in GENERATING if "encoder" not in FAMILIES[name].stacks])
def test_ranks_are_those_of_the_models_own_maps(name: str) -> None:
    """And the model is left as it was: its kind of attention, its hooks, its training flags."""
    model, _, _ = ready(name)
    inputs = FAMILIES[name].inputs(model, 3, None)
    before = state(model)
    kinds = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    ranks = attention_ranks(model, [inputs])
    assert kinds == [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert state(model) == before
    length = inputs["input_ids"].shape[1]
    assert len(ranks) == len(discover(model).stack("decoder").blocks)
    assert all(1 <= rank <= length for rank in ranks)
    assert len(set(ranks)) > 1


def focused(model: PreTrainedModel, *blocks: int) -> PreTrainedModel:
    """Every head of these blocks mixes all tokens alike: their maps have a low rank."""
    for block in blocks:
        model.model.layers[block].self_attn.q_proj.weight.data.zero_()
    return model


def test_blocks_of_the_lowest_rank_are_converted() -> None:
    model = build("llama")
    anatomy = discover(model)
    windows = Windows.of(TEXT, "text")
    ranks = attention_ranks(model, [{"input_ids": TEXT}])
    for convert, count in ((0.01, 1), (0.5, 2), (1.0, 4)):
        policy = MixtureOfDepths(convert=convert, steps=1).fitted(model, anatomy, windows)
        chosen = policy.converted(anatomy)
        assert len(chosen) == count and 0 not in chosen
        assert max(ranks[i] for i in chosen) <= min([ranks[i] for i in range(1, 5) if i not in chosen], default=99)
    assert MixtureOfDepths(blocks="3", steps=1).fitted(model, anatomy, windows).converted(anatomy) == [3]


def test_routers_learn_which_tokens_a_block_is_for() -> None:
    model = for_one_kind()
    model.model.norm.weight.requires_grad_(False)
    anatomy = discover(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    wanting = [weight.requires_grad for weight in model.parameters()]
    batches = [{"input_ids": ids} for ids in TEXT.split(4)]
    settings: dict[str, Any] = {"ratio": 0.5, "decay": False, "vision": False}
    routers = train_depth_routers(model, anatomy, batches, [3], steps=60, **settings)
    again = train_depth_routers(model, anatomy, batches, [3], steps=60, **settings)
    assert torch.equal(routers.weight, again.weight) and torch.equal(routers.levels, again.levels)
    assert not routers.weight[[0, 1, 2, 4]].any()
    seen: list[Tensor] = []
    handle = model.model.layers[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(TEXT)
    handle.remove()
    runs = routers.score(3, seen[0]) >= routers.level(3, 0.5)
    assert runs.float().mean() == pytest.approx(0.5, abs=0.02)
    assert runs[TEXT < 50].float().mean() > runs[TEXT >= 50].float().mean() + 0.6
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert wanting == [weight.requires_grad for weight in model.parameters()]
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_trained_for_it_the_text_is_better_than_with_drawn_routers() -> None:
    model = for_one_kind()
    anatomy = discover(model)
    text = Windows.of(torch.randint(3, 90, (16, 16), generator=torch.Generator().manual_seed(7)), "held back")
    judge = Judge(model, anatomy, text)
    kl = []
    for steps in (1, 60):
        policy = MixtureOfDepths(blocks="3", steps=steps, decay=False).fitted(model, anatomy, Windows.of(TEXT, "text"))
        evidence, saved = judge(policy)
        kl.append(evidence.kl.value)
        assert saved.sublayers["decoder.3.mlp"] == pytest.approx(0.5, abs=0.3)
    assert kl[1] < 0.7 * kl[0]


def test_images_are_learnt_from_forward_arguments() -> None:
    model, anatomy, _ = ready("gemma3_image")
    inputs = FAMILIES["gemma3_image"].inputs(model, 3, "left")
    policy = MixtureOfDepths(tokens="vision", convert=0.3, steps=2).fitted_on(model, anatomy, [inputs])
    with policy.attach(model, anatomy) as attached, torch.no_grad():
        model(**inputs)
    left = [attached.counts.skipped[Address("decoder", i, "mlp")] for i in policy.converted(anatomy)]
    assert len(left) == 2 and 4 <= sum(left) <= 14  # a half of 3 times 4, in the mean of two blocks


def test_written_with_its_routers_and_refused_on_another_model(tmp_path: Path) -> None:
    policy = drawn(discover(build("llama")))
    write_policy(policy, tmp_path / "p.json", {})
    again = policy_of(str(tmp_path / "p.json"))
    assert again == policy and again.tensors().keys() == {"w", "levels"}
    assert again.turned(0.2).tensors().keys() == {"w", "levels"}
    with pytest.raises(InputError, match="its routers are for 5 blocks of width 36"):
        again.attach(build("gpt2"))
    with pytest.raises(InputError, match="needs routers trained on text"):
        MixtureOfDepths().attach(build("llama"))
    for blocks in ("0-2", "3-5"):
        with pytest.raises(InputError, match="blocks must be among 1 to 4"):
            drawn(discover(build("llama")), blocks).attach(build("llama"))
    with pytest.raises(InputError, match=r"w \[blocks, hidden\]"):
        MixtureOfDepths().with_tensors({"w": torch.zeros(5)})
    with pytest.raises(InputError, match="encoder-decoder"):
        model = build("t5")
        MixtureOfDepths().fitted(model, discover(model), Windows.of(TEXT, "text"))
