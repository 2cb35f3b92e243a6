"""The tiny models are themselves fit for use: deterministic, finite, and exact with and without a cache."""

import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build, params


@pytest.mark.parametrize("name", params)
@torch.inference_mode()
def test_forward_is_finite_and_repeats(name: str) -> None:
    family = FAMILIES[name]
    for padding in (None, "left", "right") if family.pads else (None,):
        inputs = family.inputs(model := build(name), 3, padding)
        first = model(**inputs)[0]
        assert torch.isfinite(first).all()
        assert torch.equal(first, build(name)(**inputs)[0])


@pytest.mark.parametrize("name", [n for n in params if FAMILIES[n].generates])
@torch.inference_mode()
def test_generation_is_the_same_with_and_without_a_cache(name: str) -> None:
    family = FAMILIES[name]
    model = build(name)
    prompt = family.prompt(model, 3, "left" if family.pads else None)
    cached, plain = (
        model.generate(
            **prompt, max_new_tokens=8, do_sample=False, use_cache=c, return_dict_in_generate=True, output_logits=True
        )
        for c in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=family.tolerance, rtol=0)


def test_as_many_families_as_the_readme_counts_and_names() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    counted = re.search(r"tiny random models of (\d+) families:\n\n((?:[- ] .+\n)+)", text)
    assert counted
    named = re.sub(r"\(.*?\)|- [a-z-]+: ", ",", counted[2]).replace("\n", ",").split(",")
    families = {build(name).config.model_type.removesuffix("_text") for name in params}
    assert int(counted[1]) == len([name for name in named if name.strip()]) == len(families)
