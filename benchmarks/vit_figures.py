"""Accuracy of a small trained ViT (vit-mnist of the shared models) against the compute that narrowing saves.

    python benchmarks/vit_figures.py [IMAGES] [TEST]      (default: 512 10000)

Neurons and heads are chosen on IMAGES training images without their labels; accuracy is over the first TEST test
images. Nothing is healed or trained. FLOPs are those of one image, computed; time is measured (batches of 500, dense
and narrow in turns, best of 3). Minutes."""

from __future__ import annotations

import sys

import numpy as np
import torch
from protocol import DATA
from transformers import ViTForImageClassification

import billhook
from billhook.measure.cost import CostModel
from billhook.recipes.classifier import narrow_classifier, tokens_of
from billhook.runtime.clock import now

BLIND = ("random-width", "evenly-spaced-width")


def main(images: str = "512", tests: str = "10000") -> None:
    folder = DATA.parent / "models" / "vit-mnist"
    model = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    anatomy = billhook.discover(model)
    data = np.load(DATA / "mnist.npz")
    seen, test = read(data["x_train"][: int(images)]), read(data["x_test"][: int(tests)])
    labels = torch.from_numpy(data["y_test"][: int(tests)].astype(np.int64))
    costs = CostModel(anatomy.outline, prompt_tokens=tokens_of(model, anatomy, seen), new_tokens=0)

    def show(name: str, plan: billhook.Plan) -> None:
        smaller = billhook.apply(model, anatomy, plan)
        after = costs.of((), plan.keeps)
        flops, params = (after[kind] / costs.dense[kind] for kind in ("flops", "params"))
        left = [sum(len(k.indices) for k in plan.keeps if k.inner == kind) for kind in ("neuron", "group")]
        print(
            f"{name:<44} {accuracy(smaller, test, labels):>8.2%} {flops:>6.1%} {params:>7.1%} "
            f"{speed(model, smaller, test[:500]):>6.2f}x  {left[0] or 'all':>5} neurons, {left[1] or 'all':>3} heads",
            flush=True,
        )

    print(f"{'narrowed by':<44} {'accuracy':>8} {'FLOPs':>6} {'params':>7} {'speed':>7}", flush=True)
    show("dense", billhook.Plan())
    for tolerance in (0.02, 0.1):
        for unit in ("neuron", "width"):
            plan = narrow_classifier(model, seen, tolerance=tolerance, unit=unit)
            show(f"amp, {unit}, entropy within {tolerance} an MLP", plan)
    for budget in ("flops=0.75", "flops=0.5"):
        for recipe in ("amp", "ofb", "flap", *BLIND):
            for seed in range(3 if recipe == "random-width" else 1):
                plan = narrow_classifier(model, seen, budget=budget, recipe=recipe, unit="width", seed=seed)
                show(f"{recipe}, {budget}" + (f", seed {seed}" if recipe == "random-width" else ""), plan)


def read(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images[:, None].astype(np.float32)) / 255 - 0.5) / 0.5


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor) -> float:
    answers = torch.cat([model(part).logits.argmax(-1) for part in torch.split(images, 500)])
    return (answers == labels).float().mean().item()


@torch.no_grad()
def speed(dense: torch.nn.Module, other: torch.nn.Module, images: torch.Tensor, rounds: int = 3) -> float:
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(rounds):
        for number, model in enumerate((dense, other)):
            begun = now()
            model(images)
            times[number].append(now() - begun)
    return min(times[0]) / min(times[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
