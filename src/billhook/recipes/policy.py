"""The walks behind the commands on run-time policies."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from billhook.data import Windows, calibration
from billhook.data.calibrate import Domain, evaluation
from billhook.evaluate.causal import require_causal
from billhook.evaluate.generation_speed import generation_speed
from billhook.evaluate.policy_quality import Judge
from billhook.evaluate.policy_speed import policy_speed
from billhook.evaluate.tune_policy import Goal, Tried, tune
from billhook.plan.errors import InputError
from billhook.plan.policy_record import PolicyReport, Savings
from billhook.plan.record import TextEvidence
from billhook.recipes.opened import Opened, environment, opened
from billhook.runtime.catalogue import beside, policy_of, read_policy, write_policy
from billhook.runtime.policy import Policy
from billhook.runtime.self_speculation import SelfSpeculation

Progress = Callable[[str, int, int], None]

LENGTH = 128
JUDGED_TOKENS = 16 * LENGTH
FITTED_TOKENS = 16 * LENGTH


def bench_policy(
    source: str | os.PathLike[str],
    policy: str,
    *,
    text: str = "builtin",
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PolicyReport:
    """What a policy saves and what it costs, on held-back text of the source and on text of another kind. Of
    self-speculation, which changes no text, how fast it generates and how much of its drafts is accepted."""
    chosen = policy_of(policy)
    model = open_causal(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    fitted = fit_on_text(chosen, model, text, seed)
    fitted.attach(model.model, model.anatomy).detach()  # what is impossible shows before anything expensive
    texts = held_back(model, text, seed)
    if isinstance(fitted, SelfSpeculation):
        timing, drafting = generation_speed(model.model, model.anatomy, fitted, texts[0][1], progress=progress)
        return _report(source, fitted, model).model_copy(update={"timings": (timing,), "drafting": drafting})
    judged = _judged(fitted, model, texts, progress)
    timings = policy_speed(model.model, model.anatomy, fitted, texts[0][1], progress=progress)
    return _report(source, fitted, model, judged).model_copy(update={"timings": timings})


def tune_policy(
    source: str | os.PathLike[str],
    policy: str,
    target: str,
    out: Path,
    *,
    text: str = "builtin",
    overwrite: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[PolicyReport, list[Tried]]:
    """Find the most sparing setting of a policy that meets a quality target on the text, write it to ``out``, and judge
    it on held-back text of the source and on text of another kind."""
    chosen, goal = policy_of(policy), Goal.parse(target)
    if out.suffix != ".json":
        raise InputError(f"a policy file is a .json file, not {out}")
    taken = [path for path in (out, beside(out)) if path.exists()]
    if taken and not overwrite:
        raise InputError(f"{taken[0]} exists; give --overwrite to replace it")
    if out.exists():
        read_policy(out)  # nothing but a policy file is replaced
    elif taken:
        raise InputError(f"{taken[0]} does not belong to a policy file {out.name}; name another file")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into")
    if chosen.dial is None:
        raise InputError(f"policy {chosen.name} has no threshold to tune")
    model = open_causal(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    seen = text_of(model, text, seed, JUDGED_TOKENS)
    fitted = fit_on_text(chosen, model, text, seed)
    judge = Judge(model.model, model.anatomy, seen, progress=progress)

    def priced(setting: Policy) -> tuple[TextEvidence, float]:
        evidence, saved = judge(setting)
        return evidence, getattr(saved, setting.spares)

    best, tried = tune(fitted, priced, goal)
    report = _report(source, best, model, _judged(best, model, held_back(model, text, seed), progress))
    write_policy(best, out, {"target": str(goal), "model": os.fspath(source), "text": seen.name,
                             "fingerprint": seen.fingerprint, "tried": [vars(t) for t in tried]})  # fmt: skip
    return report, tried


def _judged(
    policy: Policy, model: Opened, texts: Sequence[tuple[Domain, Windows]], progress: Progress | None
) -> list[tuple[TextEvidence, Savings]]:
    """On one text after the other, so that the plain model's logits of one text at a time are kept."""
    return [
        Judge(model.model, model.anatomy, windows, domain=domain, progress=progress)(policy)
        for domain, windows in texts
    ]


def _report(
    source: str | os.PathLike[str], policy: Policy, model: Opened, judged: Sequence[tuple[TextEvidence, Savings]] = ()
) -> PolicyReport:
    return PolicyReport(
        model=os.fspath(source),
        policy=policy.name,
        parameters=policy.model_dump(mode="json"),
        kv=policy.kv,
        savings=judged[0][1] if judged else None,
        evidence=tuple(evidence for evidence, _ in judged),
        environment=environment(model),
    )


def open_causal(source: str | os.PathLike[str], **settings: Any) -> Opened:
    model = opened(source, **settings)
    require_causal(model.model, "a policy's bench")
    return model


def fit_on_text(policy: Policy, model: Opened, text: str, seed: int) -> Policy:
    """The policy with what it wants to know from text, which is never the text that it is judged on in the end."""
    if not policy.wants_text:
        return policy
    return policy.fitted(model.model, model.anatomy, text_of(model, text, seed, policy.appetite * FITTED_TOKENS))


def text_of(model: Opened, text: str, seed: int, tokens: int) -> Windows:
    length = model.length(LENGTH)
    return calibration(
        text, model.tokenizer, tokens=tokens, length=length, seed=seed, model=model.model, fewest=2 * length
    )


def held_back(model: Opened, text: str, seed: int) -> list[tuple[Domain, Windows]]:
    length = model.length(LENGTH)
    return evaluation(text, model.tokenizer, tokens=JUDGED_TOKENS, length=length, model=model.model, seed=seed)
