"""How to use the result, for each target."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from itertools import pairwise

from billhook.plan.outline import Outline
from billhook.plan.record import HealStep, Run
from billhook.plan.target import Target
from billhook.plan.widths import common_sizes, counts
from billhook.report.cuts import dropped, tied

FOLDER = "path/to/this/folder"


@dataclass(frozen=True)
class Loading:
    """One sentence, and code in ``language`` that does it."""

    words: str
    language: str
    code: str


def is_language_model(outline: Outline) -> bool:
    """A single causal stack: the model predicts the next token."""
    return len(outline.stacks) == 1 and outline.stacks[0].causal


def is_ordinary(run: Run) -> bool:
    """Whether the result is a checkpoint of the stock class: only whole blocks are gone and the rest are alike, as wide
    as the config can say, each with weights of its own."""
    healing = run.healing
    if tied(run) or (healing and (healing.bridges or (healing.method == "bias" and not healing.refused))):
        return run.plan.target is Target.UNIFORM
    alike = all(len({tuple(block.sublayers) for block in stack.blocks}) <= 1 for stack in run.outline.stacks)
    alike = alike and all(a.sublayer is None for a in dropped(run))
    return run.plan.target is Target.UNIFORM or (alike and _stated(run) and not run.plan.factors)


def _stated(run: Run) -> bool:
    """Whether plain values of the config say how narrow the sublayers are."""
    sublayers = dict(run.outline.sublayers())
    keys = {sublayers[keep.unit].inner[keep.inner].key for keep in run.plan.keeps}
    sizes = common_sizes(run.outline.narrowed(counts(run.plan.keeps)), dropped(run)) if keys else {}
    return all(key and sizes[key] is not None for key in keys)


def loading(run: Run) -> Loading:
    """How to load the folder that this run wrote."""
    auto = "AutoModelForCausalLM" if is_language_model(run.outline) else "AutoModel"
    if is_ordinary(run):
        words = "An ordinary checkpoint: whatever loads the original model loads this one."
        if run.plan.sparsities:
            words += (
                " Zeros are stored and multiplied with like any weight; only an engine with kernels for them gains."
            )
        if run.healing is not None and run.healing.paths:
            words += (
                " In its folder `adapter` are paths of low rank beside its linears, a LoRA adapter for peft; all "
                "figures here are of the model with them."
            )
            return Loading(words, "python", _with_adapter(auto))
        return Loading(words, "python", _transformers(auto, ""))
    match run.plan.target:
        case Target.DECI:
            words = (
                "The DeciLM form, where each block has its own shape: written for vLLM and for llama.cpp's converter, "
                "and loaded by plain transformers with the modelling file that lies in the folder. "
                "Remote code runs on your machine, so read that file first."
            )
            serve = f"vllm serve {FOLDER} --trust-remote-code\npython convert_hf_to_gguf.py {FOLDER}  # of llama.cpp"
            return Loading(words, "sh", serve)
        case Target.ANY:
            words = "Billhook loads this result without running any code from the folder."
            return Loading(words, "python", f'import billhook\n\nmodel = billhook.load("{FOLDER}").model')
        case _:
            words = (
                "Plain transformers with the small modelling file that lies in the folder; Billhook is not needed. "
                "Remote code runs on your machine, so read that file first."
            )
            return Loading(words, "python", _transformers(auto, ", trust_remote_code=True"))


def commands(run: Run) -> str:
    """The commands that make the same result again: from the plan exactly (unless it was healed: a plan does not hold
    the new weights), and by a new search where there was one, then healing by healing."""
    model = shlex.quote(run.model)
    if run.returned:
        made = run.plan.provenance
        back = {"base": run.returned.base, "recipe": made.recipe, "seed": str(made.seed or 0)}
        return f"billhook restore {model} {_options(back)} --out DIR"
    lines = [] if run.healing else [f"billhook apply {model} billhook.json --out DIR"]
    if not run.asked:
        return "\n".join(lines)
    calibration = run.measures.calibration if run.measures else ""
    seed = run.plan.provenance.seed
    steps = run.healing.steps if run.healing else ()
    count = _in_one_go(steps, calibration, seed or 0)
    later = steps[count:]
    folders = [*("CUT" if n == 0 else f"HEALED{n}" for n in range(len(later))), "DIR"]
    cut = {
        "budget": run.asked,
        "target": str(run.plan.target),
        "recipe": run.plan.provenance.recipe,
        "calibration": calibration,
        "prior": run.search.prior if run.search else "",
        **(_way(steps[count - 1]) if count else {"heal": "none"}),
        "seed": "" if seed is None else str(seed),
    }
    lines.append(f"billhook compress {model} {_options(cut)} --out {folders[0]}")
    for step, (source, out) in zip(later, pairwise(folders), strict=True):
        tokens = "" if step.tokens is None else str(step.tokens)
        asked = {"method": step.method, "select": step.select, "tokens": tokens, "calibration": step.text}
        lines.append(f"billhook heal {source} {_options(asked | {'seed': str(step.seed)})} --out {out}")
    return "\n".join(lines)


def _in_one_go(steps: tuple[HealStep, ...], calibration: str, seed: int) -> int:
    """How many of them compress takes together with the cut: an act of the recipe, and a healing."""
    for number, step in enumerate(steps):
        apart = step.method == "bridge" or (step.method == "eora" and not step.counted)
        if apart or (step.text, step.seed, step.tokens) != (calibration, seed, None):
            return number
        if not step.combined:
            return number + 1
    return len(steps)


def _way(step: HealStep) -> dict[str, str]:
    """Said where the recipe may say otherwise; an act that combines blocks is the recipe's own."""
    return {} if step.combined else {"heal": step.method, "select": step.select}


def _options(values: dict[str, str]) -> str:
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in values.items() if value)


def _with_adapter(auto: str) -> str:
    code = f"from peft import PeftModel\n{_transformers(auto, '')}"
    return f'{code}\nmodel = PeftModel.from_pretrained(model, "{FOLDER}/adapter")'


def _transformers(auto: str, extra: str) -> str:
    return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{FOLDER}"{extra})'
