"""``billhook eval``: how good is a model, alone or against another one?"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from billhook.evaluate import evidence, generations, probes
from billhook.measure.cost import UNITS, CostModel
from billhook.models import fingerprint
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Quantity, Run
from billhook.recipes.opened import Opened, Stopwatch, environment, opened
from billhook.recipes.proof import RECORD, judged_on

Progress = Callable[[str, int, int], None]


def evaluate(
    source: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    calibration: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Perplexity on two texts; with ``against``, everything paired with that model, taken as the dense one.

    The texts are the held-back part of the calibration source (the one that ``source`` was compressed with, unless
    ``calibration`` names another) and one of another domain. Without ``against`` both sides of the record are the same
    model.
    """
    clock = Stopwatch()
    with clock.step("load"):
        model, dense = pair(source, against, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    read = calibrated_with(source)
    texts = judged_on(dense, calibration or read[0], (), seed, progress, read_before=read)
    with clock.step("evidence"):
        found = evidence(dense.model, model.model, texts, progress=progress)
    run = compared(source, model, dense).model_copy(update={"evidence": found})
    if against is not None:
        with clock.step("probes"):
            answered = probes(dense.model, model.model, model.tokenizer, progress=progress)
        with clock.step("generations"):
            said = generations(dense.model, model.model, model.tokenizer)
        run = run.model_copy(update={"probes": answered, "generations": said})
    return run.model_copy(update={"seconds": clock.seconds})


def pair(
    source: str | os.PathLike[str],
    against: str | os.PathLike[str] | None,
    *,
    dtype: str | None,
    device: str,
    trust_remote_code: bool,
) -> tuple[Opened, Opened]:
    """A model and the one it is compared with (itself where there is none), in the same dtype.

    Raises InputError for two models that do not speak the same tokens.
    """
    settings: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "beside": True}
    model = opened(source, dtype=dtype, **settings)
    if against is None:
        return model, model
    dense = opened(against, dtype=dtype, like=model, **settings)
    if model.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
        raise InputError(f"{source} and {against} have different vocabularies; only models of one tokenizer compare")
    return model, dense


def calibrated_with(source: str | os.PathLike[str]) -> list[str]:
    """The texts that a result of Billhook was calibrated and healed on, that of the cut first; for any other model
    ``builtin``."""
    record = recorded(source)
    cut = record.measures.calibration if record and record.measures else ""
    steps = record.healing.steps if record and record.healing else ()
    return list(dict.fromkeys([cut or "builtin", *(text for step in steps for text in step.read)]))


def recorded(source: str | os.PathLike[str]) -> Run | None:
    """The record in a folder that Billhook wrote, which may be named itself; None where there is none. InputError for a
    damaged one."""
    path = Path(source) if Path(source).name == RECORD else Path(source) / RECORD
    if not path.is_file():
        return None
    try:
        record = Run.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is damaged, or of another version of Billhook: what was cut cannot be read from it"
        ) from error
    return record.model_copy(update={"plan": record.plan.beside(path)})


def compared(source: str | os.PathLike[str], model: Opened, dense: Opened) -> Run:
    """The record of two models before anything is measured: what they cost, and what made one from the other."""
    record = recorded(source)
    before, after = (CostModel(side.anatomy.outline).dense for side in (dense, model))
    gone = sum(sum(edit.zeros.values()) for edit in record.plan.sparsities) if record else 0
    after = {**after, "params": after["params"] - gone}
    return Run(
        model=os.fspath(source),
        outline=dense.anatomy.outline,
        plan=record.plan if record and record.plan.provenance.model == fingerprint(dense.model) else Plan(),
        asked=record.asked if record else None,
        costs={kind: Quantity(unit=UNITS[kind], dense=before[kind], compressed=after[kind]) for kind in UNITS},
        realised={kind: after[kind] / before[kind] for kind in UNITS if before[kind]},
        environment=environment(model),
    )
