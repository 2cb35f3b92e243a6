"""``billhook policies compare``: every run-time policy on the user's own model and text, side by side."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from billhook import search
from billhook.evaluate.generation_speed import generation_speed
from billhook.evaluate.policy_probes import answers_step_by_step
from billhook.evaluate.policy_quality import Judge
from billhook.evaluate.probes import paired, posed
from billhook.evaluate.turn_policy import turned_to
from billhook.models import building, check_out, fingerprint
from billhook.plan.budget import Budget, split_budgets
from billhook.plan.errors import InputError
from billhook.plan.policy_comparison import PolicyComparison, PolicyEntry
from billhook.plan.policy_record import Savings
from billhook.plan.record import ProbeEvidence
from billhook.recipes import catalogue
from billhook.recipes import policy as walk
from billhook.recipes.compare import RANDOM_SEEDS
from billhook.recipes.find import find
from billhook.recipes.measures import watch
from billhook.recipes.opened import Opened, Stopwatch, environment
from billhook.recipes.settings import COMPARED_QUESTIONS
from billhook.recipes.workplace import claimed, keep
from billhook.report.policy_comparison import write_policy_comparison
from billhook.runtime.catalogue import policy_of
from billhook.runtime.policy import Policy
from billhook.runtime.static_skip import StaticSkip

Progress = Callable[[str, int, int], None]
Chosen = Callable[[], Policy]

STANDARD = (
    "static-skip", "ffn-skip", "neuron-experts", "voids", "similarity-exit", "lora-drop:rank=8", "first-router",
    "mixture-of-depths", "kv-share", "self-speculation",
)  # fmt: skip
"""Those that take part where none is named; ``static-skip`` without units skips the blocks of least influence."""
TURNED_TOKENS = 4 * walk.LENGTH
"""Tokens of the user's text on which dials are turned; nothing is judged on them."""
ROUNDS = 5


@dataclass(frozen=True)
class _Part:
    """One line of the comparison: what it is called, what is asked of it, and how its setting is found."""

    name: str
    policy: str
    asked: str
    baseline: bool
    setting: Chosen
    given: Mapping[str, object] = field(default_factory=dict)


def compare_policies(
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    budgets: str = "flops=0.9,0.8,0.7",
    policies: Sequence[str] = (),
    calibration: str = "builtin",
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    told: Callable[[PolicyEntry], None] | None = None,
) -> PolicyComparison:
    """Hold ``policies`` (by default ``STANDARD``) and the baselines against the plain model, all on the same text, and
    leave ``comparison.json`` and ``comparison.html`` in ``out``.

    ``budgets`` is the work of a generated token or its cache, as in "flops=0.9,0.8,kv_bytes=0.5". A policy with a dial
    has it turned to each budget of what it spares, on a piece of the calibration text, which also fits what wants to be
    fitted; one without, one whose kind of budget is not asked for, and one that says itself where its dial stands, as
    a file of ``tune-policy`` does, runs as it is given.
    Baselines: the plain model, blocks skipped evenly, and at random (drawn several times). Every setting is judged on
    text that nothing was fitted on: perplexity and divergence while text is generated, exact answers to questions
    written token by token, and one call of ``generate``, timed in turns with the plain model. ``told`` hears of each
    entry when it is done. Interrupted, the same call goes on after the last finished entry.

    Cost: for each entry about what ``bench_policy`` costs and the probes, for each dial and budget up to nine
    judgements of ``TURNED_TOKENS``. Memory: the plain model's logits on both texts.
    """
    check_out(out, overwrite, source)
    asked = _work(budgets)
    chosen = {text: policy_of(text) for text in dict.fromkeys(policies or STANDARD)}
    clock = Stopwatch()
    with clock.step("load"):
        model = walk.open_causal(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    questions = posed(model.model, model.tokenizer, COMPARED_QUESTIONS)
    with claimed(out) as place:
        with clock.step("plain model"):
            bench = _Bench(model, calibration, seed, place, progress)
            before = answers_step_by_step(model.model, questions, progress)

        def probe() -> tuple[ProbeEvidence, ...]:
            return paired(before, answers_step_by_step(model.model, questions, progress))

        parts = _parts(chosen, asked, bench, seed)
        entries = [PolicyEntry(name="plain", policy="plain", asked="", baseline=True, probes=paired(before, before))]
        for number, part in enumerate(parts):
            if progress is not None:
                progress("policies", number, len(parts))
            kept = place / f"{bench.key(part)}.json"
            if kept.exists():
                entry = PolicyEntry.model_validate(json.loads(kept.read_text(encoding="utf-8"))[0])
            else:
                with clock.step("policies"):
                    entry = bench.entry(part, probe)
                keep(kept, [entry])
            if told is not None:
                told(entry)
            entries.append(entry)
        if progress is not None:
            progress("policies", len(parts), len(parts))
        result = PolicyComparison(
            model=os.fspath(source),
            outline=model.anatomy.outline,
            calibration=calibration,
            budgets=tuple(asked),
            given=tuple(policies),
            entries=tuple(entries),
            seed=seed,
            environment=environment(model),
            seconds=clock.seconds,
        )
        with building(out, overwrite) as folder:
            write_policy_comparison(result, Path(folder))
        shutil.rmtree(place, ignore_errors=True)
    return result


class _Bench:
    """One model and its texts: where settings are found, and where they are judged."""

    def __init__(self, model: Opened, calibration: str, seed: int, place: Path, progress: Progress | None) -> None:
        self.model, self.progress, self._place = model, progress, place
        self._source, self._seed = calibration, seed
        self.seen = walk.text_of(model, calibration, seed, TURNED_TOKENS)
        self.texts = walk.held_back(model, calibration, seed)
        self._turning = Judge(model.model, model.anatomy, self.seen, progress=progress)
        self._judges = [
            Judge(model.model, model.anatomy, text, domain=domain, progress=progress) for domain, text in self.texts
        ]
        self._fitted: dict[str, Policy] = {}
        self._savings: dict[tuple[str, str], Savings] = {}

    def turned(self, text: str, policy: Policy, budget: str) -> Policy:
        """A policy fitted once, its dial turned to the budget."""
        (limit,) = Budget.parse(budget).limits

        def cost(setting: Policy) -> float:
            found: float = getattr(self._saved(setting), limit.kind)
            return found

        return turned_to(self.fitted(text, policy), limit.amount, cost, limit.kind)

    def fitted(self, text: str, policy: Policy) -> Policy:
        """A policy as it is given, with what it wants to know from text."""
        if text not in self._fitted:
            self._fitted[text] = walk.fit_on_text(policy, self.model, self._source, self._seed)
        return self._fitted[text]

    def _saved(self, setting: Policy) -> Savings:
        key = setting.name, setting.model_dump_json()
        if key not in self._savings:
            self._savings[key] = self._turning(setting)[1]
        return self._savings[key]

    def skipping(self, recipe: str, budget: str, seed: int) -> Policy:
        """As few blocks skipped as bring a token's work or cache to the budget, chosen by a recipe."""
        outline, tokens = self.model.anatomy.outline, self.seen.ids.shape[1]
        problem = search.pose(
            outline, Budget.parse(budget), "block", stack="decoder", prompt_tokens=1, new_tokens=tokens
        )
        word, seen = catalogue.load(recipe), watch(self.model, self.seen, None)
        choice = find(word, self.model, problem, self.seen, seen, seed=seed, place=self._place, progress=self.progress)
        return StaticSkip(units="+".join(str(unit) for unit in sorted(choice.found.drops)))

    def entry(self, part: _Part, probe: Callable[[], tuple[ProbeEvidence, ...]]) -> PolicyEntry:
        """What becomes of the model under a policy; a refusal with its reason where it cannot be."""
        clock = Stopwatch()
        entry = PolicyEntry(name=part.name, policy=part.policy, asked=part.asked, baseline=part.baseline)
        model, anatomy = self.model.model, self.model.anatomy
        try:
            with clock.step("entry"):
                policy = part.setting()
                timing, drafting = generation_speed(
                    model, anatomy, policy, self.texts[0][1], rounds=ROUNDS, progress=self.progress
                )
                found = {"parameters": policy.model_dump(mode="json"), "kv": policy.kv, "timing": timing}
                if drafting is not None:
                    found |= {"drafting": drafting}
                else:
                    judged = [judge(policy) for judge in self._judges]
                    with policy.attach(model, anatomy):
                        answered = probe()
                    evidence = tuple(text for text, _ in judged)
                    found |= {"savings": judged[0][1], "evidence": evidence, "probes": answered}
        except InputError as error:  # one that is not possible here does not end the comparison
            return entry.model_copy(update={"refused": str(error)})
        return entry.model_copy(update=found | {"seconds": clock.seconds["entry"]})

    def key(self, part: _Part) -> str:
        """Names everything that an entry depends on."""
        parts: dict[str, object] = {
            "part": [part.name, part.policy, part.asked, dict(part.given)],
            "seed": self._seed,
            "questions": COMPARED_QUESTIONS,
            "model": fingerprint(self.model.model),
            "environment": environment(self.model),
            "texts": [text.fingerprint for text in (self.seen, *(text for _, text in self.texts))],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _parts(chosen: dict[str, Policy], budgets: Sequence[str], bench: _Bench, seed: int) -> list[_Part]:
    """Baselines first, then each policy at each budget of what it spares, or once where there is nothing to turn.
    Blocks skipped for good spare work and cache."""
    parts: list[_Part] = []
    for budget in budgets:
        for draw in range(seed, seed + RANDOM_SEEDS):
            random = partial(bench.skipping, "random", budget, draw)
            parts.append(_Part(f"at random (seed {draw})", "static-skip", budget, True, random))
        even = partial(bench.turned, "even-skip", policy_of("even-skip"), budget)
        parts.append(_Part("even-skip", "even-skip", budget, True, even))
    for text, policy in chosen.items():
        if text == "even-skip":
            continue  # stands among the baselines
        influence = isinstance(policy, StaticSkip) and not policy.units
        as_given = policy.dial is None or policy.dial[0] in policy.model_fields_set
        own = [b for b in budgets if influence or (not as_given and Budget.parse(b).limits[0].kind == policy.spares)]
        if not own:
            parts.append(_Part(text, policy.name, "", False, partial(bench.fitted, text, policy), _told(policy)))
        for budget in own:
            setting = (
                partial(bench.skipping, "block-influence", budget, seed)
                if influence
                else partial(bench.turned, text, policy, budget)
            )
            parts.append(_Part(text, policy.name, budget, False, setting, _told(policy)))
    return parts


def _told(policy: Policy) -> dict[str, object]:
    """What was given: parameters, and what tensors came with them, by a digest of each."""
    digests = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in policy.tensors().items()}
    return {**policy.model_dump(), **digests}


def _work(text: str) -> list[str]:
    """Amounts of work or cache; InputError for any other budget."""
    budgets = split_budgets(text)
    for budget in budgets:
        (limit,) = Budget.parse(budget).limits
        if limit.kind not in ("flops", "kv_bytes") or not limit.relative:
            raise InputError(
                f"budget {budget}: policies are compared at shares of the work or of the cache, as in "
                f"flops=0.9,0.8,kv_bytes=0.5"
            )
    return budgets
