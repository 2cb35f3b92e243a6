"""Runs to draw: a realistic one of 30 blocks, a mere inspection, and shapes that are hard to lay out."""

from __future__ import annotations

import math

from billhook.plan.address import Address
from billhook.plan.comparison import Comparison, Entry
from billhook.plan.outline import BlockOutline, Outline, StackOutline, SublayerOutline
from billhook.plan.plan import Plan, Provenance
from billhook.plan.policy_comparison import PolicyComparison, PolicyEntry
from billhook.plan.policy_record import Drafting, Savings
from billhook.plan.record import (
    Generation,
    HealRecord,
    HealStep,
    Interval,
    Look,
    Measures,
    ProbeEvidence,
    Quantity,
    Run,
    SearchRecord,
    Step,
    TextEvidence,
    Timing,
    TrainingRecord,
    Workload,
)
from billhook.plan.target import Target

ATTENTION = SublayerOutline(params=885_312, active_params=884_736, heads=9, kv_heads=3, head_dim=64, cache_width=384)
CROSS = SublayerOutline(params=885_312, active_params=884_736, heads=9, kv_heads=9, head_dim=64, cache_width=384)
MLP = SublayerOutline(params=2_654_784, active_params=2_654_208, neurons=1536)
ORDER = ("decoder.25", "decoder.24.attention", "decoder.21.mlp", "decoder.27.attention", "decoder.22",
         "decoder.11.mlp", "decoder.28.attention", "decoder.13", "decoder.19.mlp", "decoder.12.attention",
         "decoder.23.attention")  # fmt: skip


def outline(blocks: int = 30) -> Outline:
    block = BlockOutline(sublayers={"attention": ATTENTION, "mlp": MLP})
    stack = StackOutline(name="decoder", hidden_size=576, causal=True, blocks=(block,) * blocks)
    return Outline(
        family="example", stacks=(stack,), other_params=28_312_128, head_params=28_311_552, bytes_per_param=2.0
    )


def two_stacks() -> Run:
    """An encoder-decoder with nothing measured, some of each kind cut."""
    encoder = BlockOutline(sublayers={"attention": ATTENTION, "mlp": MLP})
    decoder = BlockOutline(sublayers={"attention": ATTENTION, "cross_attention": CROSS, "mlp": MLP})
    paper = outline().model_copy(
        update={
            "stacks": (
                StackOutline(name="encoder", hidden_size=576, causal=False, blocks=(encoder,) * 12),
                StackOutline(name="decoder", hidden_size=576, causal=True, blocks=(decoder,) * 6),
            )
        }
    )
    cuts = ["encoder.3", "encoder.4", "encoder.7.mlp", "decoder.2.cross_attention", "decoder.4"]
    return Run(model="org/translator", outline=paper, plan=Plan.of(cuts), realised={"params": 0.79}, asked="params=0.8")


def example_run(blocks: int = 30) -> Run:
    """A fifth of SmolLM2-135M gone, with everything that a run can hold."""
    paper = outline(blocks)
    plan = Plan.of(ORDER[:10], Target.REMOTE).model_copy(
        update={
            "budget": "params=0.8",
            "provenance": Provenance(
                model="b1946ac92492d2347c6235b4d2611184" * 2, calibration="591785b794601e212b260e25925636fd" * 2,
                recipe="greedy", seed=0, versions={"billhook": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            ),
        }
    )  # fmt: skip
    steps = _steps(paper)
    kept = steps[9].realised["params"]
    return Run(
        model="HuggingFaceTB/SmolLM2-135M",
        outline=paper,
        plan=plan,
        asked="params=0.8",
        realised={"params": kept, "size": 0.84, "kv_bytes": 0.77},
        costs={
            "params": Quantity(unit="parameters", dense=paper.block_params, compressed=kept * paper.block_params),
            "size": Quantity(unit="bytes", dense=269.1e6, compressed=226.3e6),
            "flops": Quantity(unit="FLOPs", dense=0.312e12, compressed=0.262e12),
            "kv_bytes": Quantity(unit="bytes per token", dense=23040, compressed=17664),
        },
        search=SearchRecord(
            recipe="lazy greedy", objective="loss_change", steps=steps, work=4_331_520, evaluations=212
        ),
        measures=measures(blocks),
        evidence=(
            _evidence("WikiText-2, held back", "calibration", 22.81, 51.93, 0.851, 0.603),
            _evidence("TinyStories", "other", 9.42, 24.77, 1.124, 0.571),
        ),
        probes=(
            _probe("addition, 1 digit", 0.75, 0.0417, 0.196),
            _probe("copying words", 0.833, 0.25, 0.213),
            _probe("counting on", 0.875, 0.875, 0.1),
        ),
        generations=(
            Generation(
                prompt="The lighthouse keeper opened the door and",
                dense=" saw a man standing there, wet from the storm. He had a lantern in his hand and asked whether "
                "he could stay until the morning.",
                compressed=" looked out at the sea. The sea was a small, small, and the wind was a little bit of a "
                "little bit of the wind.",
                repeated_dense=0.0,
                repeated_compressed=0.12,
            ),
            Generation(
                prompt="Water boils at 100 degrees Celsius because",
                dense=" at this temperature its vapour pressure equals the pressure of the atmosphere at sea level.",
                compressed=" the temperature of the water is higher than the temperature of the air.",
            ),
        ),
        timings=(
            _timing("prefill", 1, 512, 0, 1180.0, 1.193, 1.218),
            _timing("decode, batch 1", 1, 128, 128, 41.7, 1.231, 1.262),
            _timing("decode, batch 8", 8, 128, 128, 208.0, 1.214, 1.249),
        ),
        seconds={"load": 2.1, "measure": 14.3, "search": 171.2, "evaluate": 64.0, "bench": 88.5},
        environment={"device": "cpu, 2 threads", "dtype": "bfloat16", "python": "3.11.2", "system": "Linux x86_64"},
    )


def healed_run() -> Run:
    """The realistic run healed once more, as ``billhook heal`` writes it: refitted with the cut, then trained towards
    the text, nearer to which it is further from the dense model."""
    run = example_run()
    training = TrainingRecord(
        trains="lora", goal="text", parameters=4_884_480, tokens_a_step=2048, held_tokens=8192,
        curve=(Look(step=0, loss=None, held=3.3), Look(step=12, held=3.1, loss=3.4), Look(step=24, held=3.0, loss=3.2)),
        best=24, stopped_early=False,
        untrained=(
            _evidence("WikiText-2, held back", "calibration", 22.81, 60.4, 0.712, 0.63),
            _evidence("TinyStories", "other", 9.42, 28.3, 1.03, 0.58),
        ),
    )  # fmt: skip
    healing = HealRecord(
        tokens=20_480, work=614_400, refits=(), training=training,
        steps=(
            HealStep(method="closed-form", text="wiki_calib", seed=0),
            HealStep(method="lora", text="wiki_calib", seed=0, tokens=49_152),
        ),
        unhealed=(
            _evidence("WikiText-2, held back", "calibration", 22.81, 84.1, 1.21, 0.52),
            _evidence("TinyStories", "other", 9.42, 35.6, 1.48, 0.49),
        ),
    )  # fmt: skip
    seconds = {"load": 2.1, "measure": 1.4, "heal": 311.0, "evaluate": 64.0, "bench": 88.5}
    return run.model_copy(update={"healing": healing, "seconds": seconds})


def inspection() -> Run:
    """Measures only, nothing cut."""
    return Run(model="HuggingFaceTB/SmolLM2-135M", outline=outline(), plan=Plan(), measures=measures())


def measures(blocks: int = 30) -> Measures:
    depth = range(blocks)
    bump = [0.9 / (1 + i) + 0.5 * math.exp((i - blocks) / 2) + 0.05 + 0.02 * math.sin(2.1 * i) for i in depth]
    influence = {f"decoder.{i}": bump[i] for i in depth}
    loss = {f"decoder.{i}.attention": 0.02 + 0.6 * bump[i] * (1 + math.cos(3.7 * i)) / 4 for i in depth}
    loss |= {f"decoder.{i}.mlp": 0.04 + bump[i] * (1.2 + math.sin(5.3 * i)) / 3 for i in depth}
    norm = {f"decoder.{i}.{kind}": 0.1 + bump[i] / 3 * (1.4 if kind == "mlp" else 1) for i in depth
            for kind in ("attention", "mlp")}  # fmt: skip
    angular = [
        [min(0.97, sum(bump[i : i + n]) ** 0.7 / (n**0.25) * 0.25) for i in range(blocks - n + 1)]
        for n in range(1, blocks + 1)
    ]
    return Measures(
        scores={"block_influence": influence, "loss_change": loss, "relative_norm": norm},
        angular={"decoder": angular},
        calibration="wiki_calib",
        tokens=3072,
    )


def _steps(paper: Outline) -> tuple[Step, ...]:
    left, steps = float(paper.block_params), []
    for n, unit in enumerate(ORDER):
        sublayer = Address.parse(unit).sublayer
        left -= {"attention": ATTENTION.params, "mlp": MLP.params, None: ATTENTION.params + MLP.params}[sublayer]
        objective = 0.035 * (n + 1) + 0.0045 * (n + 1) ** 2
        realised = {"params": left / paper.block_params, "size": 1 - 0.016 * (n + 1)}
        steps.append(
            Step(units=(unit,), score=objective / (n + 1), objective=objective, realised=realised, work=n * 400_000)
        )
    return tuple(steps)


def _around(value: float, share: float = 0.03) -> Interval:
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def _evidence(name: str, domain: str, dense: float, compressed: float, kl: float, top1: float) -> TextEvidence:
    return TextEvidence(
        name=name, domain=domain, windows=16, tokens=16_368,
        protocol="per token, windows of 1,024 tokens that do not overlap, no BOS",
        perplexity_dense=_around(dense, 0.05), perplexity_compressed=_around(compressed, 0.06),
        perplexity_ratio=_around(compressed / dense), kl=_around(kl), top1=_around(top1, 0.012),
    )  # fmt: skip


def _probe(name: str, dense: float, compressed: float, half: float) -> ProbeEvidence:
    change = compressed - dense
    return ProbeEvidence(
        name=name, items=24, dense=dense, compressed=compressed,
        difference=Interval(value=change, low=change - half, high=change + half),
    )  # fmt: skip


def _timing(name: str, batch: int, prompt: int, new: int, rate: float, gain: float, ideal: float) -> Timing:
    cache = batch * (prompt + new) * 23040
    return Timing(
        workload=Workload(name=name, batch=batch, prompt_tokens=prompt, new_tokens=new),
        engine="transformers", rounds=9, dense_tokens_per_second=rate, compressed_tokens_per_second=rate * gain,
        speedup=_around(gain, 0.011), ideal_speedup=ideal,
        dense_peak_bytes=612_000_000 + cache, compressed_peak_bytes=541_000_000 + int(cache * 0.77),
        dense_cache_bytes=cache, compressed_cache_bytes=int(cache * 0.767),
    )  # fmt: skip


def hostile_run() -> Run:
    """The realistic run with markup in every text that a stranger could choose."""
    attack = "</p></script><script>owned = 1</script><img src=x onerror='owned = 1'>"
    run = example_run()
    assert run.measures is not None and run.search is not None
    return run.model_copy(
        update={
            "model": f"{attack} | `x`",
            "evidence": tuple(t.model_copy(update={"name": attack, "protocol": attack}) for t in run.evidence),
            "probes": tuple(p.model_copy(update={"name": f"{attack} | x"}) for p in run.probes),
            "generations": (Generation(prompt=attack, dense=attack, compressed=attack),),
            "timings": tuple(
                t.model_copy(
                    update={"engine": attack, "workload": t.workload.model_copy(update={"name": f"{i} {attack}"})}
                )
                for i, t in enumerate(run.timings)
            ),
            "measures": run.measures.model_copy(
                update={"scores": {f"{name} {attack}": units for name, units in run.measures.scores.items()}}
            ),
            "search": run.search.model_copy(update={"objective": attack, "recipe": attack}),
            "environment": {attack: attack},
            "seconds": {attack: 1.0},
        }
    )


def comparison(blocks: int = 30, hostile: bool = False) -> Comparison:
    """Five methods at two budgets; one of them cannot meet the second."""
    paper, entries = outline(blocks), []
    methods = {"sublayer-greedy": 2.0, "block-greedy": 2.6, "block-influence": 3.4, "evenly-spaced": 3.2, "random": 9.0}
    nasty = "</script><script>owned = 1</script><b>" if hostile else ""
    for share, steepness in ((0.9, 0.5), (0.8, 1.0)):
        for recipe, factor in methods.items():
            for seed in range(3 if recipe == "random" else 1):
                sublayers = recipe == "sublayer-greedy"
                damage = (factor + seed) ** steepness
                every = max(1, round(1 / (1 - share)))
                drops = [f"decoder.{i}.mlp" if sublayers else f"decoder.{i}" for i in range(seed, blocks, every)]
                entry = Entry(
                    recipe=recipe, seed=seed, baseline=recipe in ("evenly-spaced", "random"), asked=f"params={share}",
                    target=Target.REMOTE if sublayers else Target.UNIFORM, drops=tuple(drops),
                    realised={"params": share - 0.004}, work=3_000_000 if sublayers else 92_160, evaluations=100,
                    seconds=12.0,
                    evidence=(
                        _evidence(f"builtin{nasty}", "calibration", 14.9, 14.9 * damage, damage, 0.5),
                        _evidence("docstrings", "other", 17.0, 17.0 * damage * 1.1, damage, 0.4),
                    ),
                    probes=(
                        _probe(f"addition{nasty}", 0.75, 0.75 / damage, 0.1), _probe("recall", 0.5, 0.5 / damage, 0.1)
                    ),
                )  # fmt: skip
                entries.append(entry)
    refused = Entry(
        recipe="attention-drop", seed=0, baseline=False, asked="params=0.8", target=Target.REMOTE,
        refused=f"budget params=0.8 cannot be met{nasty}",
    )  # fmt: skip
    return Comparison(
        model=f"a model{nasty}", outline=paper, calibration="builtin", tokens=3072,
        budgets=("params=0.9", "params=0.8"), entries=(*entries, refused),
        titles=dict.fromkeys([*methods, "attention-drop"], f"A title{nasty}"), environment={"torch": "2"},
        seconds={"recipes": 700.0},
    )  # fmt: skip


def policy_comparison(blocks: int = 30, hostile: bool = False) -> PolicyComparison:
    """Three policies and two baselines at two amounts of work, one that leaves the text as it is, one refused."""
    nasty = "</script><script>owned = 1</script><b>" if hostile else ""
    policies = {"ffn-skip": (1.04, 1.1), "static-skip": (1.5, 1.25), "voids": (1.9, 0.9), "even-skip": (1.8, 1.2)}
    entries = [PolicyEntry(name="plain", policy="plain", asked="", baseline=True, probes=(_probe("x", 0.6, 0.6, 0.0),))]
    for share, power in ((0.9, 1.0), (0.8, 2.0)):
        for name, (damage, speed) in {**policies, "at random (seed 0)": (40.0, 1.2)}.items():
            damage, speed = damage**power, speed**power
            runs = {f"decoder.{i}.{kind}": 0.3 if name == "ffn-skip" else 0.0 for i in range(3, blocks, 7)
                    for kind in (["mlp"] if name == "ffn-skip" else ["attention", "mlp"])}  # fmt: skip
            entry = PolicyEntry(
                name=f"{name}{nasty}" if name == "voids" else name, policy=name.split(" ")[0], asked=f"flops={share}",
                baseline=name in ("even-skip", "at random (seed 0)"), kv=f"a rule{nasty}",
                parameters={"threshold": 0.95, "prompt": [1.0, 0.2], "text": nasty},
                savings=Savings(blocks=blocks * share, blocks_plain=blocks, flops=share, kv_bytes=1.0, sublayers=runs),
                evidence=(
                    _evidence(f"builtin{nasty}", "calibration", 14.9, 14.9 * damage, damage - 1, 0.9),
                    _evidence("docstrings", "other", 17.0, 17.0 * damage, damage - 1, 0.8),
                ),
                probes=(_probe(f"addition{nasty}", 0.75, 0.4, 0.1), _probe("recall", 0.45, 0.3, 0.1)),
                timing=_timing(f"generate{nasty}", 1, 64, 64, 30.0, speed, 1.0), seconds=20.0,
            )  # fmt: skip
            entries.append(entry)
    drafting = Drafting(drafted=200, accepted=150, acceptance=0.75, tokens_per_verify=3.1, same_text=1.0)
    speculating = PolicyEntry(
        name="self-speculation", policy="self-speculation", asked="", drafting=drafting,
        timing=_timing("generate", 1, 64, 64, 30.0, 0.94, 1.0),
    )  # fmt: skip
    refused = PolicyEntry(name="lora-drop", policy="lora-drop", asked="flops=0.8", refused=f"never so cheap{nasty}")
    return PolicyComparison(
        model=f"a model{nasty}", outline=outline(blocks), calibration="builtin", budgets=("flops=0.9", "flops=0.8"),
        given=(), entries=(*entries, speculating, refused), environment={"torch": "2"}, seconds={"policies": 700.0},
    )  # fmt: skip
