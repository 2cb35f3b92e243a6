"""The losses, against their definitions on whole logits."""

from __future__ import annotations

import pytest
import torch
from families import build
from heal.training.training_bed import PLAN, text

from billhook.anatomy import discover
from billhook.heal.training import distil
from billhook.heal.training.damage import Damage, damage, feature_weights
from billhook.heal.training.head import halves
from billhook.heal.training.student import Student, ends_of, frozen
from billhook.plan.address import Address
from billhook.surgery import apply, simulate


def student(name: str, goal: str = "dense") -> Student:
    model = build(name)
    anatomy = discover(model)
    ends = ends_of(anatomy, PLAN.drops, anatomy.stacks[0])
    return Student(apply(model, anatomy, PLAN), model, ends, goal)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "opt_post_norm", "gpt2"])
def test_divergence_and_loss_are_those_of_whole_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that do not divide the tokens, with scaled and soft-capped logits; gradients too."""
    monkeypatch.setattr(distil, "CHUNK", 7)
    ids = text(3).ids
    both = student(name)
    dense, cut = both._dense[0], both.model
    log_p = dense(ids).logits[:, :-1].log_softmax(-1).detach()
    log_q = cut(ids).logits[:, :-1].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss = -log_q.gather(-1, ids[:, 1:, None]).mean()
    probe = next(both.blocks[0].parameters())
    for goal, expected in (("dense", kl), ("text", loss)):
        both.goal = goal  # type: ignore[assignment]
        found = both(ids)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        (slope,) = torch.autograd.grad(found, probe)
        (wanted,) = torch.autograd.grad(expected, probe, retain_graph=True)
        torch.testing.assert_close(slope, wanted, atol=1e-5, rtol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(both(ids), expected, atol=1e-5, rtol=1e-4)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "CHUNK", 5)
    both = student("llama")
    sizes: list[int] = []
    both.model.get_output_embeddings().register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    both(text(4).ids).backward()
    assert max(sizes) <= 5


def test_streams_are_compared_where_the_next_block_reads() -> None:
    """Blocks 1 and 3 are gone: block 0 is to reach what comes out of 1, block 2 what comes out of 3."""
    anatomy = discover(build("llama"))
    stack = anatomy.stacks[0]
    found = ends_of(anatomy, frozenset({Address("decoder", 1), Address("decoder", 3)}), stack)
    path = stack.path
    assert found == [(f"{path}.0", f"{path}.1"), (f"{path}.1", f"{path}.3"), (f"{path}.2", f"{path}.4")]


def test_damage_is_nothing_before_the_gap_and_feature_terms_begin_as_large_as_the_divergence() -> None:
    both = student("llama")
    ids = text(6).ids
    with frozen(both):
        found = damage(both, ids)
        assert not any(parameter.requires_grad for parameter in both.parameters())
    assert found.errors[0] > 0, "the block before the gap lacks what the gap did"
    assert len(found.errors) == len(found.pull) == 4
    both.weights = feature_weights(found, "all")
    assert set(both.weights) == {0, 1, 2, 3}
    with torch.no_grad():
        assert both(ids).item() == pytest.approx(2 * found.loss, rel=1e-4)
    tail = feature_weights(found, "tail")
    assert set(tail) == {3}
    assert tail[3] * found.errors[3] == pytest.approx(found.loss)
    assert feature_weights(found, "none") == {}
    few = Damage(2.0, (0.5, 0.5), (1.0, 1.0))
    assert feature_weights(few, "tail") == {1: 4.0}, "the last block, where a quarter is none"


def test_pull_is_the_slope_towards_the_dense_stream() -> None:
    """Against a small step there: the loss falls by about as much as the pull says, where all tokens pull one way."""
    both = student("llama")
    ids = text(2).ids
    _, streams, wanted = both.parts(ids)
    with frozen(both):
        found = damage(both, ids)
    step = 1e-3
    number = len(streams) - 1

    def towards(module, args, output):  # type: ignore[no-untyped-def]
        stream = output[0] if isinstance(output, tuple) else output
        moved = stream + step * (wanted[number].detach() - stream)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with torch.no_grad():
        before = both.parts(ids)[0]
        handle = both.blocks[number].register_forward_hook(towards)
        fall = (before - both.parts(ids)[0]).item() / step
        handle.remove()
    assert 0 < fall <= found.pull[number] * 1.05


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_halves_make_the_whole(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    ids = text(2).ids
    with torch.no_grad(), simulate(model, anatomy, PLAN):
        expected = model(ids).logits
        blocks = list(model.get_submodule(anatomy.stacks[0].path))
        hidden, head, streams = halves(model, ids, blocks)
        torch.testing.assert_close(head(hidden.flatten(0, 1)), expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
        assert len(streams) == 4
