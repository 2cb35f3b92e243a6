"""The depth audit on the page: every picture with a sentence that its own figures make."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from report.example import inspection
from report.example_audit import BLOCKS, audited, stack_audit

from billhook.plan.audit import Skips
from billhook.plan.record import Measures, Run
from billhook.report.audit import parts
from billhook.report.page import page
from billhook.report.sentences_audit import contributions, maps, neighbours, skips, stitches, tokenwise


def pictures(run: Run) -> list[dict[str, Any]]:
    return [json.loads(s) for s in re.findall(r'<script type="application/json">(.*?)</script>', page(run))]


def test_the_page_has_the_section_with_all_its_pictures() -> None:
    text = page(audited())
    assert re.findall(r'<section id="(\w+)"', text) == ["model", "importance", "angular", "audit", "provenance"]
    assert 'href="#audit"' in text
    assert len(pictures(audited())) - len(pictures(inspection())) == 11
    assert text.count("plotly.js v") == 1
    assert "maps fitted on 2,048 tokens, everything judged on 1,024 others; 1,500,000 block-token forwards." in text
    assert "audit" not in re.findall(r'<section id="(\w+)"', page(inspection()))


def test_a_record_survives_the_disk() -> None:
    assert Run.model_validate_json(audited().model_dump_json()) == audited()


def test_every_part_says_something() -> None:
    found = parts(audited())
    assert len(found) == 6
    assert all(part.says.endswith(".") and part.how.endswith(".") for part in found)


def test_sentences_follow_the_figures() -> None:
    audit = stack_audit()
    said = contributions(audit)
    assert "first and the second half of the stack: attention 0.40 and 0.10; MLP 0.40 and 0.10." in said
    assert "Mean cosine: attention −0.10 and 0.10; MLP −0.10 and 0.10." in said
    assert "a transition at block 15 (a step there explains 90.0% of the differences between blocks, a steady" in said
    assert "from 0.80 to 0.20 of the stream, the cosine from −0.10 to 0.10." in said
    said = skips(audit)
    assert (
        "For later tokens, later blocks change by 60.0% on average if the skipped block is in the first half, by"
        in said
    )
    assert "The output changes least without block 1 (0.050 nats), most without block 0 (0.50)." in said
    assert "The output of later tokens changes least without block 1 (0.010 nats)" in said
    said = maps(audit)
    assert "From one depth to the next an affine map explains 95.1% on average" in said
    assert "Over half of the stack it explains 47.2%." in said
    assert "The longest stretch with a CKA of 0.9 or more throughout is depth 0 to 2." in said
    said = tokenwise(audit)
    assert "explains 75.5% of an update on average, least in block 29 (61.0%) and most in block 0 (90.0%)." in said
    assert "closely related: Spearman's rank correlation is 1.00." in said
    said = stitches(audit)
    assert "the cheapest is from depth 15 to 30 (0.25 nats), the dearest from 1 to 30 (4.0)." in said
    assert "The mean is 1.6 ahead and 4.7 back." in said
    said = neighbours(audit)
    assert said.startswith("At depth 0, 15, 30 the mean cosine is 0.50, 0.35, 0.20 for tokens 1 apart;")
    assert said.endswith("0.01, 0.01, 0.01 for tokens 64 apart.")


def test_each_picture_has_its_words_also_where_nothing_stands_out() -> None:
    """Two pictures, two statements: direction beside size, CKA beside maps, the output beside the share left over."""
    audit = stack_audit()
    assert "Mean cosine: " in contributions(stack_audit(transition=None))
    apart = tuple(tuple(float(i == j) for j in range(len(audit.cka))) for i in range(len(audit.cka)))
    assert maps(stack_audit(cka=apart)).endswith("No two neighbouring depths have a CKA of 0.9.")
    assert tokenwise(stack_audit(correlation=None)).endswith("too few blocks, or all alike.")


def test_no_transition_is_said_with_its_reason() -> None:
    found = stack_audit().transition
    assert found is not None
    slope = found.model_copy(update={"found": False, "slope": 0.95})
    assert "no clear transition: a steady slope explains 95.0%" in contributions(stack_audit(transition=slope))
    weak = found.model_copy(update={"found": False, "step": 0.3, "slope": 0.1})
    assert "no clear transition: the best step explains 30.0%" in contributions(stack_audit(transition=weak))
    assert "too short" in contributions(stack_audit(transition=None))


@pytest.mark.parametrize("output", ["kl", "stream"])
def test_what_was_not_measured_is_left_out(output: str) -> None:
    run = audited(skips=None, stitches=None, correlation=None, left_out="no such thing", neighbours={}, output=output)
    assert [part.title.split()[0] for part in parts(run)] == ["What", "How", "What"]
    assert len(pictures(run)) - len(pictures(inspection())) == 6
    assert "Not all was measured: no such thing." in page(run)


def test_a_stack_that_is_not_causal_has_no_future() -> None:
    now = stack_audit().skips
    assert now is not None
    alone = Skips(now=now.now, future=(), output_now=now.output_now, output_future=())
    assert "later tokens" not in skips(stack_audit(skips=alone, output="stream"))
    assert "of the last stream's energy" in skips(stack_audit(skips=alone, output="stream"))


def test_stacks_are_told_apart() -> None:
    run = inspection().model_copy(update={"audits": {"encoder": stack_audit(), "decoder": stack_audit()}})
    titles = [part.title for part in parts(run)]
    assert len(titles) == len(set(titles)) == 12


def test_maps_show_the_skipped_block_above_and_nothing_before_it() -> None:
    now = next(spec for spec in pictures(audited()) if spec["data"][0].get("zmax") == 1.0)["data"][0]
    assert now["type"] == "heatmap"
    assert now["z"][0][:2] == [None, 0.6]
    assert now["z"][BLOCKS - 1] == [None] * BLOCKS


def test_the_two_pictures_before_the_audit_have_words_of_their_own() -> None:
    """What matters least by each score, and which span turns the stream least, by the figures that are drawn."""
    scores = {"block-influence, blocks": {"decoder.0": 0.9, "decoder.1": 0.2, "decoder.2": math.inf, "decoder.10": 0.1}}
    angular = {"decoder": [[0.3, 0.2, 0.1, 0.4, 0.2, 0.3], [0.5] * 5, [0.5] * 4, [0.9, 0.4, 0.8], [0.9, 0.9], [0.9]]}
    measures = Measures(scores=scores, angular=angular)
    text = page(inspection().model_copy(update={"measures": measures}))
    assert "Lowest in block-influence, blocks: decoder.10, decoder.1, decoder.0." in text
    assert "The least turn in decoder: block 2; of 4 in a row, blocks 1 to 4." in text
    assert "Lowest" not in page(inspection().model_copy(update={"measures": Measures(angular=angular)}))
