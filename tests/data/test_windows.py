"""Windows: full, in order, deterministic, one BOS where the tokenizer wants one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from billhook.data import Text, Windows, calibration, check_overlap, check_tokenizer, evaluation, overlap, windows
from billhook.data.builtin import builtin, docstrings
from billhook.data.source import read
from billhook.data.windows import spread
from billhook.models import load
from billhook.plan.errors import InputError

PLAIN = make_tokenizer()
WITH_BOS = make_tokenizer(add_bos=True)
BOS = 1
PROSE = Text("prose", builtin().parts[:120])
SHORT = Text("short", builtin().parts[:12])


def test_windows_are_the_text_in_a_row() -> None:
    ids = PLAIN(PROSE.content, add_special_tokens=False).input_ids
    found = windows(PROSE, PLAIN, tokens=4 * 64, length=64)
    assert found.ids.dtype == torch.int64 and found.ids.shape == (4, 64)
    assert found.ids.flatten().tolist() == ids[:256]  # no special tokens, nothing between lines, nothing lost
    later = windows(PROSE, PLAIN, tokens=2 * 64, length=64, skip=2)
    assert torch.equal(later.ids, found.ids[2:])


def test_a_tokenizer_that_adds_bos_gets_one_a_window() -> None:
    ids = PLAIN(PROSE.content).input_ids
    found = windows(PROSE, WITH_BOS, tokens=4 * 64, length=64)
    assert (found.ids[:, 0] == BOS).all() and not (found.ids[:, 1:] == BOS).any()
    assert found.ids[:, 1:].flatten().tolist() == ids[: 4 * 63]


@pytest.mark.parametrize("text", ["<s>" + PROSE.content, "".join("<s>" + part for part in PROSE.parts)])
def test_bos_is_never_doubled(text: str) -> None:
    found = windows(Text("t", (text,)), WITH_BOS, tokens=20 * 16, length=16)
    assert (found.ids[:, 0] == BOS).all() and not (found.ids[:, 1] == BOS).any()


def test_a_tokenizer_that_adds_none_gets_none() -> None:
    assert not (windows(PROSE, PLAIN, tokens=640, length=64).ids == BOS).any()


@given(st.integers(2, 90), st.integers(1, 12), st.booleans())
def test_windows_are_full_and_in_order(length: int, count: int, bos: bool) -> None:
    tokenizer = WITH_BOS if bos else PLAIN
    found = spread(SHORT, tokenizer, tokens=count * length, length=length)
    assert found.ids.shape == (count, length)
    ids = PLAIN(SHORT.content).input_ids
    starts = []
    for row in found.ids[:, int(bos) :].tolist():
        after = starts[-1] + len(row) if starts else 0
        starts.append(next(i for i in range(after, len(ids)) if ids[i : i + len(row)] == row))  # disjoint, in order


def test_calibration_is_spread_over_the_front() -> None:
    front = PROSE.split()[0]
    ids = PLAIN(front.content).input_ids
    found = calibration(PROSE, PLAIN, tokens=4 * 32, length=32)
    places = [len(ids) // 32 * i // 4 * 32 for i in range(4)]
    assert found.ids.tolist() == [ids[p : p + 32] for p in places]
    assert places[-1] > len(ids) // 2


def test_the_same_seed_gives_the_same_windows_and_another_moves_them() -> None:
    def fingerprint(seed: int) -> str:
        return calibration(PROSE, PLAIN, tokens=256, length=32, seed=seed).fingerprint

    assert fingerprint(0) == fingerprint(0) and fingerprint(5) == fingerprint(5)
    assert len({fingerprint(seed) for seed in range(5)}) > 2


def test_fingerprints_tell_ids_and_shapes_apart() -> None:
    ids = torch.arange(12)
    prints = {Windows.of(ids.view(shape), "n").fingerprint for shape in ((3, 4), (4, 3), (2, 6))}
    prints.add(Windows.of((ids + 1).view(3, 4), "n").fingerprint)
    assert len(prints) == 4
    assert Windows.of(ids.view(3, 4), "other").fingerprint in prints  # the name is not part of it


def test_too_little_text_says_how_much_there_is() -> None:
    text = Text("small", tuple(PROSE.parts[:4]))
    there = len(PLAIN(text.content).input_ids)
    with pytest.raises(InputError, match=rf"small has {there} tokens, 4096 are needed"):
        windows(text, PLAIN, tokens=4096, length=64)


@pytest.mark.parametrize(("tokens", "length"), [(10, 64), (0, 0), (64, 1), (-5, 64)])
def test_impossible_sizes_are_refused(tokens: int, length: int) -> None:
    with pytest.raises(InputError, match="impossible"):
        windows(PROSE, PLAIN, tokens=tokens, length=length)


def test_empty_text_and_no_tokenizer_are_refused() -> None:
    with pytest.raises(InputError, match="void is empty"):
        windows(Text("void", (" ", "\n")), PLAIN, tokens=64, length=8)
    with pytest.raises(InputError, match="no tokenizer"):
        windows(PROSE, None, tokens=64, length=8)


def test_a_tokenizer_must_fit_the_model() -> None:
    check_tokenizer(PLAIN, len(PLAIN))
    with pytest.raises(InputError, match=f"number {len(PLAIN) - 1}.*0 to {len(PLAIN) - 2}"):
        check_tokenizer(PLAIN, len(PLAIN) - 1)


@pytest.mark.parametrize("source", ["builtin", PROSE])
def test_calibration_and_evaluation_share_nothing(source: Any) -> None:
    calibrated = calibration(source, PLAIN, tokens=4096, length=64)
    found = evaluation(source, PLAIN, tokens=2048, length=128, calibrated_on=[calibrated])
    assert [domain for domain, _ in found] == ["calibration", "other"]
    names = [w.name for _, w in found]
    assert names[0].endswith("last 20%")
    assert names[1] == ("docstrings of the standard library" if source == "builtin" else "builtin")
    if source == "builtin":
        assert all(overlap(w, calibrated) == 0 for _, w in found)


def test_overlap_is_found_wherever_windows_are_cut() -> None:
    ids = torch.randint(0, 300, (4000,), generator=torch.Generator().manual_seed(0))
    calibrated = Windows.of(ids[:2048].view(-1, 64), "calibrated")
    shifted = Windows.of(ids[37 : 37 + 1024].view(-1, 128), "shifted")
    fresh = Windows.of(ids[2048 : 2048 + 1024].view(-1, 128), "fresh")
    assert overlap(fresh, calibrated) == 0
    assert overlap(shifted, calibrated) > 0.3  # runs across a border between windows are not seen
    check_overlap(fresh, calibrated)
    with pytest.raises(InputError, match=r"shifted cannot be evaluated on.*calibrated"):
        check_overlap(shifted, calibrated)


@pytest.mark.parametrize(("shared", "refused"), [(0, False), (20, False), (100, True)])
def test_a_little_overlap_is_tolerated_and_a_tenth_is_not(shared: int, refused: bool) -> None:
    ids = torch.randint(0, 10**6, (1023,), generator=torch.Generator().manual_seed(0))  # 1,000 runs of 24
    evaluated = Windows.of(ids.view(1, -1), "evaluated")
    calibrated = Windows.of(torch.cat([ids[: shared + 23], -1 - ids[:23]]).view(1, -1), "calibrated")
    assert overlap(evaluated, calibrated) == pytest.approx(shared / 1000)
    if refused:
        with pytest.raises(InputError, match="10% of it stands in the calibration text"):
            check_overlap(evaluated, calibrated)
    else:
        check_overlap(evaluated, calibrated)


def test_a_text_that_repeats_itself_is_refused_for_evaluation() -> None:
    text = Text("loop", (builtin().parts[0],) * 400)
    calibrated = calibration(text, PLAIN, tokens=2048, length=64)
    with pytest.raises(InputError, match="loop"):
        evaluation(text, PLAIN, tokens=1024, length=64, calibrated_on=[calibrated])


def test_the_model_writes_its_own_text(tiny_lm: Path) -> None:
    loaded = load(tiny_lm)
    model, tokenizer = loaded.model.train(), loaded.tokenizer
    state = torch.random.get_rng_state()

    def write(seed: int, **options: Any) -> Windows:
        return calibration("self", tokenizer, tokens=3 * 24, length=24, seed=seed, model=model, **options)

    steps: list[tuple[str, int, int]] = []
    first = write(0, progress=lambda *step: steps.append(step))
    assert first.ids.shape == (3, 24) and len({tuple(row) for row in first.ids.tolist()}) == 3
    assert first.fingerprint == write(0).fingerprint != write(1).fingerprint
    assert steps[-1] == ("writing text", 24, 24)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    held_back = evaluation("self", tokenizer, tokens=72, length=24, calibrated_on=[first], model=model)
    assert [domain for domain, _ in held_back] == ["calibration", "other"]


class Counting(nn.Module):
    """A language model that always continues n with n + 1, and counts in its cache how far it has come."""

    config = SimpleNamespace(is_encoder_decoder=False)
    device = torch.device("cpu")

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: torch.Tensor, past_key_values: int | None, use_cache: bool) -> Any:
        logits = torch.full((*input_ids.shape, 999), -1e9).scatter(-1, input_ids[..., None] + 1, 0.0)
        return SimpleNamespace(logits=logits, past_key_values=(past_key_values or 0) + input_ids.shape[1])


@pytest.mark.parametrize(("tokenizer", "expected"), [(PLAIN, [2, 3, 4, 5, 6]), (WITH_BOS, [1, 2, 3, 4, 5])])
def test_written_text_starts_from_bos_and_goes_on_past_eos(tokenizer: Any, expected: list[int]) -> None:
    ids = calibration("self", tokenizer, tokens=10, length=5, model=Counting()).ids
    assert ids.tolist() == [expected] * 2


class Drawing(Counting):
    """A language model whose next token is 3, 4 or 5, whatever came before; it must not be in training mode."""

    chances = torch.tensor([0.6, 0.3, 0.1])

    def forward(self, input_ids: torch.Tensor, past_key_values: int | None, use_cache: bool) -> Any:
        assert not self.training
        logits = torch.full((*input_ids.shape, 9), -1e9)
        logits[..., 3:6] = self.chances.log() + 2.0
        return SimpleNamespace(logits=logits, past_key_values=(past_key_values or 0) + input_ids.shape[1])


def test_tokens_are_drawn_as_the_model_gives_them() -> None:
    model = Drawing().train()
    found = calibration("self", PLAIN, tokens=200 * 25, length=25, model=model).ids
    shares = found.flatten().bincount(minlength=9) / found.numel()
    torch.testing.assert_close(shares[3:6], Drawing.chances, atol=0.03, rtol=0)
    assert model.training


def test_the_model_goes_on_from_pieces_of_a_text(tmp_path: Path) -> None:
    text = tmp_path / "field.txt"
    text.write_text(PROSE.content)
    front = spread(Text("front", read(text).split()[0].parts), WITH_BOS, tokens=3 * 8, length=8)
    ids = calibration(f"self:{text}", WITH_BOS, tokens=3 * 32, length=32, model=Counting()).ids
    assert torch.equal(ids[:, :8], front.ids) and len(front.ids.unique(dim=0)) == 3
    assert torch.equal(ids[:, 8:], ids[:, 7:8] + torch.arange(1, 25))  # and the model never read it from the start
    held_back = evaluation(f"self:{text}", PLAIN, tokens=64, length=32)[0][1]
    assert torch.equal(held_back.ids, evaluation(text, PLAIN, tokens=64, length=32)[0][1].ids)


def test_within_a_window_the_model_goes_on_from_new_pieces(tmp_path: Path) -> None:
    text = tmp_path / "field.txt"
    text.write_text(PROSE.content)
    front = spread(Text("front", read(text).split()[0].parts), WITH_BOS, tokens=6 * 25, length=25).ids
    found = calibration(f"self:{text}", WITH_BOS, tokens=2 * 300, length=300, model=Counting()).ids.reshape(6, 100)
    assert torch.equal(found[:, :25], front)
    assert torch.equal(found[:, 25:], found[:, 24:25] + torch.arange(1, 76))
    uneven = calibration(f"self:{text}", WITH_BOS, tokens=2 * 301, length=301, model=Counting()).ids
    assert uneven.shape == (2, 301) and torch.equal(uneven[:, 101:126], front[1::3])


def test_where_beginnings_are_few_no_two_windows_share_one(tmp_path: Path) -> None:
    text = tmp_path / "field.txt"
    text.write_text(SHORT.content)
    ids = calibration(f"self:{text}", WITH_BOS, tokens=30 * 300, length=300, model=Counting()).ids.reshape(30, 3, 100)
    of_each = [{tuple(piece[:25].tolist()) for piece in window} for window in ids]
    assert {len(own) for own in of_each} == {2}  # a third piece goes on from the first beginning again
    assert len(set.union(*of_each)) == 60
    with pytest.raises(InputError, match="are needed"):
        calibration(f"self:{text}", WITH_BOS, tokens=200 * 300, length=300, model=Counting())


def test_what_the_model_went_on_from_judges_nothing() -> None:
    texts = [
        evaluation(PROSE, PLAIN, tokens=64, length=32, read_before=[before]) for before in ("self:builtin", "self")
    ]
    assert [found[1][1].name for found in texts] == [docstrings().name, builtin().name]


def test_a_text_to_go_on_from_must_exist() -> None:
    with pytest.raises(InputError, match=r"missing.* does not exist"):
        calibration("self:missing.txt", PLAIN, tokens=64, length=32, model=Counting())


def test_only_a_causal_model_can_write(tiny_tokenizer: Any) -> None:
    from families import build

    for model in (None, build("bert"), build("t5")):
        with pytest.raises(InputError, match="self needs"):
            calibration("self", tiny_tokenizer, tokens=16, length=8, model=model)


def test_wikitext_windows_are_the_usual_ones(demo_folder: Path, shared_data: Path) -> None:
    tokenizer = load(demo_folder).tokenizer
    found = windows(shared_data / "wikitext2_raw_test.txt.gz", tokenizer, tokens=16 * 1024, length=1024)
    assert found.ids.shape == (16, 1024)
    assert tokenizer.decode(found.ids[0, :8]).startswith(" \n = Robert Boulter")
    assert not (found.ids == tokenizer.bos_token_id).any()


def test_all_of_a_short_text_where_fewer_suffice() -> None:
    whole = len(PLAIN(SHORT.content, add_special_tokens=False).input_ids) // 64
    assert spread(SHORT, PLAIN, tokens=64 * (whole + 99), length=64, fewest=64).ids.shape == (whole, 64)
    assert spread(SHORT, PLAIN, tokens=64 * 2, length=64, fewest=64).ids.shape == (2, 64)
    with pytest.raises(InputError, match="are needed"):
        spread(SHORT, PLAIN, tokens=64 * (whole + 99), length=64, fewest=64 * (whole + 1))
