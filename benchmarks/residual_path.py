"""What a path of low rank beside a linear is worth that has zeros among its weights (SmolLM2-135M, WikiText-2).

    python benchmarks/residual_path.py [MODEL] [TOKENS] [DTYPE] [EVERY] [WINDOWS]    (default: demo 4096 bfloat16 1 16)

EoRA (arXiv 2410.21271) gives each compressed linear a path of low rank for what it lacks of the dense one, fitted where
its inputs lie: the matrix of that rank nearest to the lost weights on these inputs. A path
of a tenth of a linear's parameters stands beside a mask that keeps half of them, and beside it a mask alone that keeps
six tenths: equally many numbers that are not zero. Masks are Wanda's; masks and paths are made of one pass through the
dense model. ``error``: the share of the linears' outputs that is lost, by energy. EVERY=5 takes every fifth block only,
the others stay dense. Minutes to an hour, by the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from protocol import LENGTH, bed
from torch import Tensor

from billhook.anatomy.linears import linears
from billhook.data import Windows
from billhook.heal import Healing, healed
from billhook.recipes.settings import CALIBRATION_LENGTH
from billhook.search.masks import Pattern, chosen

PATH = 0.1
ROWS: tuple[tuple[str, Pattern, float, float], ...] = (
    ("unstructured", None, 0.5, 0),
    ("unstructured", None, 0.5, PATH),
    ("unstructured", None, 0.5 + PATH, 0),
    ("2:4", (2, 4), 0.5, 0),
    ("2:4", (2, 4), 0.5, PATH),
)


def main(
    source: str = "demo", tokens: str = "4096", dtype: str = "bfloat16", every: str = "1", windows: str = "16"
) -> None:
    b = bed(source)
    b.live.to(getattr(torch, dtype))
    test = Windows.of(b.test.ids[: int(windows)], b.test.name)
    blocks = [block for stack in b.anatomy.stacks for block in stack.blocks][:: int(every)]
    names = [
        linear.name
        for block in blocks
        for sublayer in block.sublayers
        for linear in linears(b.live, sublayer, block.path)
    ]
    grams: dict[str, Tensor] = {}
    modules = {name: b.live.get_submodule(name.removesuffix(".weight")) for name in names}
    hooks = [module.register_forward_hook(adding(grams, name)) for name, module in modules.items()]
    with torch.inference_mode():
        for ids in b.calibrated(int(tokens), CALIBRATION_LENGTH).ids:
            b.live(ids[None])
    for hook in hooks:
        hook.remove()
    print(f"{len(blocks)} blocks, {tokens} tokens of wiki_calib, {len(test.ids)} windows of {LENGTH}, {dtype}")
    print(f"{'masks':<14} {'kept':>5} {'paths':>6} {'error':>7} {'WikiText-2':>10}")
    print(f"{'dense':<14} {1:>5} {0:>6} {0:>7} {b.perplexity(test=test):>10.2f}", flush=True)
    energies = {name: energy(b.live.get_parameter(name).detach().float(), grams[name]) for name in names}
    for label, pattern, share, path in ROWS:
        new, lost = {}, 0.0
        for name in names:
            dense, gram = b.live.get_parameter(name).detach().float(), grams[name]
            lack = dense * ~chosen(dense.abs() * gram.diagonal().sqrt(), share, pattern, by_row=True)
            if path:
                lack = lack - nearest(lack, gram, round(path * dense.numel() / sum(dense.shape)))
            new[name] = (dense - lack).to(b.live.dtype)
            lost += energy(lack, gram)
        with healed(b.live, Healing(new, (), {}, 0, 0)):
            found = b.perplexity(test=test)
        print(f"{label:<14} {share:>5} {path:>6} {lost / sum(energies.values()):>7.4f} {found:>10.2f}", flush=True)


def adding(grams: dict[str, Tensor], name: str) -> Callable[..., None]:
    def add(module: Any, given: Any, output: Any) -> None:
        rows = given[0].reshape(-1, given[0].shape[-1]).float()
        grams[name] = grams.get(name, 0) + rows.T @ rows

    return add


def nearest(lost: Tensor, gram: Tensor, rank: int) -> Tensor:
    """U U' of the lost weights [outputs, inputs], U being the first left singular vectors of them times a root of the
    Gram matrix: of this rank the nearest on these inputs (Eckart-Young)."""
    damped = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram))
    basis, _, _ = torch.svd_lowrank(lost @ torch.linalg.cholesky(damped), q=rank + 8, niter=4)
    u = basis[:, :rank]
    return u @ (u.T @ lost)


def energy(weight: Tensor, gram: Tensor) -> float:
    """Of what a linear puts out, over all tokens."""
    return float((weight @ gram * weight).sum())


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:])
