"""What each policy leaves out, and which keys and values later tokens find: against the plain model with the outputs of
its parts replaced by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import pytest
import torch
from families import FAMILIES, build
from running import GENERATING, equal, generate, ready
from torch import Tensor, nn

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.data.decoding import forward
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.schedule import Schedule, Site
from billhook.runtime.catalogue import policy_of
from billhook.runtime.images import Images
from billhook.runtime.in_turns import Scheduled
from billhook.runtime.lora_drop import LoraDrop
from billhook.runtime.low_rank import fit_factors, reduced_rank
from billhook.runtime.online import Pass, Skip, _settled
from billhook.runtime.silence import idle_params, stream_out, with_stream
from billhook.runtime.similarity_exit import SimilarityExit, _Exit
from billhook.runtime.voids import Voids

IDS = torch.tensor([[5, 9, 33, 12, 60, 7, 41], [8, 2, 77, 31, 4, 50, 19]])


@contextmanager
def replaced(model: nn.Module, path: str, output: Callable[[Tensor, Tensor, int], Tensor]) -> Iterator[None]:
    """A block computes all it does, keys and values included, and then hands on output(in, out, number of the call)."""
    calls = iter(range(1000))

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        into = args[0] if args else kwargs["hidden_states"]
        return with_stream(out, output(into, stream_out(out), next(calls)))

    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", GENERATING)
def test_a_block_left_out_for_a_token_still_has_its_keys_and_values(name: str) -> None:
    """Skipped at every second generated token: the logits are those of a block that computes its keys and values from
    the stream that comes in, and whose output is thrown away."""
    model, anatomy, prompt = ready(name)
    block = anatomy.stack("decoder").blocks[2]
    turns = Schedule(tables=((Site(unit=block.address, verb="skip"),), ()))
    with Scheduled(schedule=turns).attach(model, anatomy) as attached:
        under = generate(model, prompt)
    with replaced(model, block.path, lambda into, out, call: into if call % 2 else out):
        by_hand = generate(model, prompt)
    assert equal(under, by_hand)
    rows = next(iter(prompt.values())).shape[0]
    assert attached.counts.skipped[Address("decoder", 2, "mlp")] == 2 * rows  # at steps 0 and 2 of the 4 that are read
    kept = anatomy.outline.stack("decoder").blocks[2].sublayers["attention"].cache_width > 0
    assert attached.counts.projected[Address("decoder", 2, "attention")] == (2 * rows if kept else 0)


def decoded(model: Any, ids: Tensor, prompt: int = 3) -> Tensor:
    """Logits [rows, t, vocabulary]: a prompt read at once, then token by token with the cache."""
    with torch.no_grad():
        parts, cache = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)], None
        logits = []
        for part in parts:
            given, cache = forward(model, part, cache)
            logits.append(given)
    return torch.cat(logits, dim=1)


def test_ffn_skip_leaves_out_what_follows_saturation() -> None:
    """Everything counts as saturated: of the middle blocks 1 to 3 the first runs, the next two do not; prompt and
    warm-up run whole."""
    model = build("llama")
    anatomy = discover(model)
    policy = policy_of("ffn-skip:threshold=-1,span=2,first=1,last=1,warmup=1")
    with policy.attach(model, anatomy) as attached:
        under = decoded(model, IDS)
    assert {str(u): n for u, n in attached.counts.skipped.items()} == {"decoder.2.mlp": 6, "decoder.3.mlp": 6}

    def without(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        return torch.zeros_like(out) if calls[module] > 1 else None

    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, args: Any) -> None:
        calls[module] = calls.get(module, -1) + 1

    for index in (2, 3):
        model.model.layers[index].mlp.register_forward_pre_hook(count)
        model.model.layers[index].mlp.register_forward_hook(without)
    assert torch.equal(under, decoded(model, IDS))


def test_a_saturated_row_skips_and_its_neighbour_does_not() -> None:
    model = build("llama")
    anatomy = discover(model)
    cosines: list[Tensor] = []
    layer = model.model.layers[1]
    seen: list[Tensor] = []
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        layer.register_forward_hook(
            lambda module, args, out: cosines.append(torch.cosine_similarity(seen[-1], out, dim=-1))
        ),
    ]
    plain = decoded(model, IDS[:, :4])
    for hook in hooks:
        hook.remove()
    low, high = sorted(cosines[-1].flatten().tolist())
    between = (low + high) / 2
    with policy_of(f"ffn-skip:threshold={between},span=1,first=1,last=2,warmup=0").attach(model, anatomy) as attached:
        under = decoded(model, IDS[:, :4])
    saturated = int(cosines[-1].flatten().argmax())
    assert torch.equal(under[1 - saturated], plain[1 - saturated])
    assert not torch.equal(under[saturated, -1], plain[saturated, -1])
    assert not attached.counts.skipped  # computed for the other row's sake: nothing was saved


def test_similarity_exit_hands_on_the_stream_as_it_left() -> None:
    """Everything is similar enough: the decoder is left after its second block, the encoder after its third."""
    model = build("t5")
    anatomy = discover(model)
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with policy_of("similarity-exit:decoder=-1,encoder=-1,first=2").attach(model, anatomy) as attached:
        under = generate(model, prompt)
    ran = {str(unit) for unit, tokens in attached.counts.ran.items() if tokens}
    assert ran == {f"encoder.{i}.{k}" for i in (0, 1) for k in ("attention", "mlp")} | {
        f"decoder.{i}.{k}" for i in (0, 1) for k in ("attention", "cross_attention", "mlp")
    }
    paths = [b.path for name in ("encoder", "decoder") for b in anatomy.stack(name).blocks[2:]]
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, out: with_stream(out, args[0]))
        for path in paths
    ]
    by_hand = generate(model, prompt)
    for handle in handles:
        handle.remove()
    assert equal(under, by_hand)


def test_an_encoder_row_is_left_by_the_mean_cosine_of_its_real_tokens() -> None:
    """Row 0 leaves; row 1 is as similar on its real tokens, and turned round on padding, which does not count; row 2 is
    turned round on a real token."""
    model = build("bart")
    block = discover(model).stack("encoder").blocks[0]
    before = torch.randn(3, 4, 36, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[1, 3] *= -1
    after[2, 0] *= -1
    real = torch.ones(3, 4, dtype=torch.bool)
    real[1, 3] = False
    trigger = _Exit(SimilarityExit(encoder=0.9, first=1), Images(model))
    now = Pass("encoder", 0, 4, 3, real)
    trigger.begin(now)
    assert trigger.decide(block, before, now) is None
    trigger.saw(block, before, after, now)
    skip = trigger.decide(block, after, now)
    assert skip is not None and skip.where is not None
    assert skip.where.tolist() == [[True] * 4, [True] * 4, [False] * 4]


def test_tokens_leave_a_decoder_one_by_one_and_none_comes_back() -> None:
    """In the first block the second token turns round, in the next one the first: it has left and stays away."""
    model = build("llama")
    block = discover(model).stack("decoder").blocks[0]
    trigger, now, stream = (
        _Exit(SimilarityExit(decoder=0.9, first=1), Images(model)),
        Pass("decoder", 0, 2, 1, None),
        torch.ones(1, 2, 4),
    )
    trigger.begin(now)
    left = []
    for turn in ([1.0, -1.0], [-1.0, 1.0]):
        trigger.saw(block, stream, stream * torch.tensor(turn)[:, None], now)
        skip = trigger.decide(block, stream, now)
        assert skip is not None and skip.where is not None
        left.append(skip.where.tolist())
    assert left == [[[True, False]], [[True, True]]]


def test_voids_have_one_map_for_reading_and_one_for_writing() -> None:
    model = build("qwen3")
    anatomy = discover(model)
    maps = {"prompt": (0.1, 1.0, 0.2, 1.0, 0.1), "generation": (1.0, 0.0, 1.0, 1.0, 1.0)}
    with Voids(threshold=0.5, **maps).attach(model, anatomy) as attached:
        under = decoded(model, IDS)
    assert {str(u): n for u, n in attached.counts.skipped.items() if u.sublayer == "mlp"} == {
        "decoder.2.mlp": 2 * 3,  # the prompt; the first and the last block always run
        "decoder.1.mlp": 2 * 4,
    }
    with (
        replaced(model, "model.layers.2", lambda into, out, call: into if call == 0 else out),
        replaced(model, "model.layers.1", lambda into, out, call: out if call == 0 else into),
    ):
        assert torch.equal(under, decoded(model, IDS))


def test_usage_is_traced_by_the_change_of_the_norm() -> None:
    """A block that writes nothing is used by nobody, one that writes a lot by everybody."""
    model = build("llama")
    for layer, scale in ((1, 0.0), (3, 300.0)):
        block = model.model.layers[layer]
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.data.mul_(scale)
    windows = Windows.of(IDS, "text")
    fitted = Voids(alpha=0.5).fitted(model, discover(model), windows)
    assert fitted.prompt[1] == fitted.generation[1] == 0.0
    assert fitted.prompt[3] == fitted.generation[3] == 1.0
    assert fitted.voids(fitted.prompt) == frozenset()
    assert 1 in fitted.turned(0.01).voids(fitted.prompt)
    with pytest.raises(InputError, match="has 2 blocks, the decoder has 5"):
        Voids(threshold=0.1, prompt=(0.1, 0.2), generation=(0.1, 0.2)).attach(model)
    with pytest.raises(InputError, match="needs maps traced on text"):
        Voids(threshold=0.1).attach(model)


def test_padding_neither_asks_for_work_nor_leaves_any_out() -> None:
    now = Pass("decoder", 0, 2, 2, torch.tensor([[False, True], [True, True]]))

    def settled(*where: list[bool]) -> Skip | None:
        return _settled(Skip(frozenset(["mlp"]), torch.tensor(where)), now)

    agreed, some = settled([False, True], [True, True]), settled([False, True], [True, False])
    assert agreed is not None and agreed.where is None
    assert some is not None and some.where is not None
    assert settled([True, False], [False, False]) is None


@pytest.mark.parametrize("reuse", ["update", "state"])
def test_lora_drop_reuses_the_last_token_and_refreshes(reuse: str) -> None:
    model = build("llama")
    anatomy = discover(model)
    generator = torch.Generator().manual_seed(0)
    factors = (torch.randn(36, 2, generator=generator) / 9, torch.randn(2, 36, generator=generator) / 9)
    names = {"decoder.2.A": factors[0], "decoder.2.B": factors[1]}
    policy = LoraDrop(blocks="2", period=2, rank=2, reuse=reuse).with_tensors(names)
    with policy.attach(model, anatomy):
        under = decoded(model, IDS)
    last: list[tuple[Tensor, Tensor]] = []

    def by_hand(into: Tensor, out: Tensor, call: int) -> Tensor:
        if call and call % 2 == 0:  # generated tokens 0 and 2 run, 1 and 3 are cheap
            before, after = last[-1]
            base = into + (after - before) if reuse == "update" else after
            out = base + (into - before) @ factors[1].T @ factors[0].T
        last.append((into[:, -1:], out[:, -1:]))
        return out

    with replaced(model, "model.layers.2", by_hand):
        torch.testing.assert_close(under, decoded(model, IDS), atol=1e-5, rtol=1e-5)


WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3", "gemma3_image", "gemma4")
GAPS = [n for n in GENERATING if n not in WINDOWED and "encoder" not in FAMILIES[n].stacks]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GAPS)
def test_tokens_of_cheap_steps_have_no_entry_and_nobody_attends_to_them(name: str, attention: str) -> None:
    """Against the plain model with all entries, where the block's later tokens are kept from attending to them."""
    model, anatomy, prompt = ready(name)
    model.set_attn_implementation(attention)
    block = anatomy.stack("decoder").blocks[2]
    caches = []
    with LoraDrop(blocks="2", period=2, writes="refresh").attach(model, anatomy) as attached:
        under = generate(model, prompt, max_new_tokens=7)
        handle = model.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
        generate(model, prompt, max_new_tokens=7)
        handle.remove()
    length = prompt["input_ids"].shape[1]
    read = [int(caches[-1].get_seq_length(layer)) for layer in range(len(anatomy.stack("decoder").blocks))]
    assert read == [length + 6, length + 6, length + 3, *[length + 6] * (len(read) - 3)]
    assert attached.counts.skipped[Address("decoder", 2, "attention")] == 2 * 3 * 2
    assert not attached.counts.projected

    last: list[tuple[Tensor, Tensor]] = []
    cheap: list[int] = []

    def by_hand(into: Tensor, out: Tensor, call: int) -> Tensor:
        if call and call % 2 == 0:
            out = into + (last[-1][1] - last[-1][0])
            cheap.append(length + call - 1)
        last.append((into[:, -1:], out[:, -1:]))
        return out

    def unseen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        keys = length + len(last) if last else length
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.zeros(1, 1, 1, keys)
        mask = mask.clone()
        mask[..., cheap] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, kwargs | ({"attention_mask": mask} if cheap else {})

    path = next(sub.module for sub in block.sublayers if sub.kind == "attention")
    handle = model.get_submodule(path).register_forward_pre_hook(unseen, with_kwargs=True)
    with replaced(model, block.path, by_hand):
        wanted = generate(model, prompt, max_new_tokens=7)
    handle.remove()
    assert len(cheap) == 3
    assert torch.equal(under[0], wanted[0])
    torch.testing.assert_close(under[1], wanted[1], atol=2e-4, rtol=2e-4)


def test_entries_that_cannot_be_left_out_are_refused() -> None:
    for name, refused in (("mistral", "have windows; take writes=all"), ("t5", "no decoder language model")):
        with pytest.raises(InputError, match=refused):
            LoraDrop(blocks="2", writes="refresh").attach(build(name))
    model, anatomy, prompt = ready("llama")
    for period in (1, 2):
        with pytest.raises(InputError, match="leave out block 0"):
            LoraDrop(blocks="0-2", period=period, writes="refresh").attach(model, anatomy)
    policy = LoraDrop(blocks="1-2", writes="refresh")
    with policy.attach(model, anatomy), pytest.raises(InputError, match="does not simply grow"):
        generate(model, prompt, cache_implementation="static")


@pytest.mark.parametrize("writes", ["all", "refresh"])
def test_texts_in_turns_do_not_see_each_other(writes: str) -> None:
    """Two caches of the same length, grown in turns and by pieces of other sizes, each as if it were alone."""
    model, anatomy, _ = ready("bloom")  # where a wrong column shows without padding
    texts = {"a": ([4, 1, 1, 1], IDS), "b": ([3, 1, 1, 1, 1], IDS.flip(1))}

    def grown(names: str) -> dict[str, Tensor]:
        caches: dict[str, Any] = dict.fromkeys(names)
        logits: dict[str, list[Tensor]] = {name: [] for name in names}
        for turn in range(5):
            for name in names:
                sizes, ids = texts[name]
                if turn < len(sizes):
                    part = ids.split(sizes, dim=1)[turn]
                    given, caches[name] = forward(model, part, caches[name])
                    logits[name].append(given)
        for name in names:  # a second turn, over whatever gaps there are, of a copy
            logits[name].append(forward(model, IDS[:, :3], copy.deepcopy(caches[name]))[0])
        return {name: torch.cat(parts, dim=1) for name, parts in logits.items()}

    with torch.no_grad(), LoraDrop(blocks="1-3", writes=writes).attach(model, anatomy) as attached:
        alone = {name: grown(name)[name] for name in texts}
        assert attached.counts.skipped
        for name, logits in grown("ab").items():
            assert torch.equal(logits, alone[name])


def test_a_cache_that_was_filled_otherwise() -> None:
    """Its steps count from where the policy came, its blocks run until there is a state; unknown gaps are refused."""
    model, anatomy, _ = ready("llama")
    with torch.no_grad():
        _, cache = forward(model, IDS[:, :5])
        with LoraDrop(blocks="1-3", writes="refresh").attach(model, anatomy) as attached:
            for place in (5, 6):
                _, cache = forward(model, IDS[:, place : place + 1], cache)
            assert {str(unit) for unit in attached.counts.skipped} >= {"decoder.1.mlp", "decoder.3.attention"}
            assert int(cache.get_seq_length(1)) == 6
            bare = copy.deepcopy(cache)
            vars(bare).pop("_billhook_turns")
            with pytest.raises(InputError, match="gaps that are not known"):
                forward(model, IDS[:, 5:], bare)
            cache.crop(-1)
            with pytest.raises(InputError, match="was cut back"):
                forward(model, IDS[:, 5:], cache)


def test_a_state_that_does_not_fit_is_not_reused() -> None:
    """Tokens that the policy did not see, and rows that were taken from the cache."""
    model, anatomy, _ = ready("llama")
    policy = LoraDrop(blocks="1-3", period=9)

    def begun() -> Any:
        cache = None
        for part in IDS[:, :5].split([4, 1], dim=1):
            _, cache = forward(model, part, cache)
        return cache

    with torch.no_grad():
        with policy.attach(model, anatomy) as attached:
            forward(model, IDS[:, 5:6], begun())
            assert attached.counts.skipped
        with policy.attach(model, anatomy) as attached:
            cache = begun()
            cache.batch_select_indices(torch.tensor([0]))
            forward(model, IDS[:1, 5:6], cache)
            assert not attached.counts.skipped
            cache = begun()
        _, cache = forward(model, IDS[:, 5:6], cache)
        with policy.attach(model, anatomy) as attached:
            forward(model, IDS[:, 6:], cache)
            assert not attached.counts.skipped


def test_a_correction_works_where_the_weights_are_moved_about() -> None:
    model, anatomy, prompt = ready("llama")
    draw = torch.Generator().manual_seed(0)
    names = {f"decoder.2.{part}": torch.randn(*s, generator=draw) / 9 for part, s in (("A", (36, 2)), ("B", (2, 36)))}
    policy = LoraDrop(blocks="2", rank=2).with_tensors(names)
    with policy.attach(model, anatomy):
        wanted = generate(model, prompt)
    moved = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with policy.attach(moved, anatomy):
        assert equal(generate(moved, prompt), wanted)


def test_corrections_that_do_not_fit_are_refused() -> None:
    model, anatomy, _ = ready("llama")
    a, b = torch.zeros(36, 2), torch.zeros(2, 36)
    policy = LoraDrop(blocks="2", rank=2)
    wrong = ({"decoder.2.A": a}, {"decoder.2.A": a, "decoder.2.B": a}, {"decoder.2.A": a[0], "decoder.2.B": b[:, 0]})
    for tensors in (*wrong, {"x": a}, {"decoder.2.A": torch.zeros(36, 3), "decoder.2.B": torch.zeros(3, 36)}):
        with pytest.raises(InputError, match="its tensors must be A"):
            policy.with_tensors(tensors)
    narrow = {"decoder.2.A": a[:30], "decoder.2.B": b[:, :30]}
    for other in (policy.with_tensors(narrow), policy.with_tensors({"decoder.1.A": a, "decoder.1.B": b})):
        with pytest.raises(InputError, match="for other blocks than these, or for another model"):
            other.attach(model, anatomy)
    with pytest.raises(InputError, match="the stream is 36 wide"):
        LoraDrop(blocks="2", rank=37).fitted(model, anatomy, Windows.of(IDS, "text"))


def test_lora_drop_never_reuses_the_state_of_another_text() -> None:
    model = build("llama")
    anatomy = discover(model)
    with LoraDrop(blocks="1-3", period=3).attach(model, anatomy):
        first = decoded(model, IDS)
        decoded(model, IDS.flip(1), prompt=5)
        assert torch.equal(decoded(model, IDS), first)
        one = decoded(model, IDS[:1])
    torch.testing.assert_close(one, first[:1], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        _, longer = forward(model, IDS[:, :6])
        plain, _ = forward(model, IDS[:, 6:], copy.deepcopy(longer))
        with LoraDrop(blocks="1-3", period=5).attach(model, anatomy):
            decoded(model, IDS[:, :4])
            assert torch.equal(forward(model, IDS[:, 6:], longer)[0], plain)  # nothing that fits: all blocks run
    with pytest.raises(InputError, match="fitted on text first"):
        LoraDrop(rank=3).attach(model)


def test_without_blocks_lora_drop_reuses_the_middle_half() -> None:
    seven = discover(build("gemma3"))
    assert [address.block for address in LoraDrop().chosen(seven)] == [1, 2, 3, 4, 5]
    assert [address.block for address in LoraDrop(blocks="3+1-2+2").chosen(seven)] == [1, 2, 3]
    with pytest.raises(InputError, match="there is no block 7; the decoder has 0 to 6"):
        LoraDrop(blocks="7").chosen(seven)


def test_the_low_rank_map_is_the_best_of_its_rank() -> None:
    """On a planted map of rank 2 it is found; and no random map of rank 1 does better than the fitted one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    planted = (
        torch.randn(12, 2, generator=generator, dtype=torch.float64) @ torch.randn(2, 12, generator=generator).double()
    )
    z = x @ planted.T
    a, b = reduced_rank(x.T @ x, z.T @ x, 2)
    assert (a @ b - planted).norm() < 0.02 * planted.norm()
    a, b = reduced_rank(x.T @ x, z.T @ x, 1)
    u, s, v = torch.linalg.svd(planted)
    best = (z - x @ (s[0] * u[:, :1] @ v[:1]).T).square().sum()
    assert (z - x @ (a @ b).T).square().sum() < 1.1 * best


def test_the_fit_predicts_the_next_change_better_than_none() -> None:
    model = build("llama")
    anatomy = discover(model)
    unit = Address("decoder", 2)
    ids = torch.randint(3, 90, (12, 40), generator=torch.Generator().manual_seed(0))
    (a, b), = fit_factors(model, anatomy, [unit], Windows.of(ids, "text"), rank=6, residual=True).values()  # fmt: skip
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.model.layers[2].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    x, y = (t.double().diff(dim=1) for t in seen[0])
    assert (y - x - x @ (a @ b).T).norm() < 0.95 * (y - x).norm()


@pytest.mark.parametrize("reuse", ["update", "state"])
def test_a_correction_is_fitted_for_what_it_stands_beside(reuse: str) -> None:
    model = build("llama")
    anatomy, unit = discover(model), Address("decoder", 2)
    windows = Windows.of(torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0)), "text")
    policy = LoraDrop(blocks="2", rank=3, reuse=reuse).fitted(model, anatomy, windows)
    wanted = fit_factors(model, anatomy, [unit], windows, rank=3, residual=reuse == "update")[unit]
    assert all(torch.equal(mine, a) for mine, a in zip(policy.tensors().values(), wanted, strict=True))
    assert policy.fitted(model, anatomy, windows) is policy


def test_what_keys_and_values_do_not_need_is_left_out() -> None:
    model = build("llama")
    attention = discover(model).sublayer(Address("decoder", 0, "attention"))
    assert idle_params(model, attention) == 2 * 36 * 60  # queries and output; 6 heads of 10, hidden 36
    fused = build("gpt2")
    assert idle_params(fused, discover(fused).sublayer(Address("decoder", 0, "attention"))) == 32 * 32
