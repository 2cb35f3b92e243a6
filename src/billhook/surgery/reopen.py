"""Loading what Billhook saved: heterogeneous checkpoints too, without running the code that comes with them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from billhook import models
from billhook.anatomy import Anatomy, discover
from billhook.anatomy.bridge import BRIDGE, build_bridge
from billhook.anatomy.undo import Undo
from billhook.models.checks import read_config
from billhook.models.load import config_of
from billhook.models.quiet import quiet
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep
from billhook.surgery.biases import add_biases
from billhook.surgery.factorise import empty
from billhook.surgery.form import Form, read_form
from billhook.surgery.live import drop
from billhook.surgery.low_rank_experts import empty_experts
from billhook.surgery.narrow import narrow
from billhook.surgery.sharing import share
from billhook.surgery.skips import PER_LAYER, READ_GLOBALLY, declares_cuts

STOCK = "billhook_stock"  # in a config.json under a foreign model_type: the values that transformers knows


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> models.Loaded:
    """As ``models.load``, and besides whatever ``export`` writes, sublayers missing included.

    The result is an instance of the stock class with stubs in the place of what is missing, exactly as ``apply`` leaves
    it. No code from the folder runs for that; ``trust_remote_code`` only matters for models that transformers does not
    have.
    """
    folder = models.locate(source, trust_remote_code)
    settings = read_config(folder)
    with stock_view(folder, settings) as view:
        if not declares_cuts(read_config(view)):
            loaded = models.load(view, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        else:
            loaded = models.load(view, dtype=dtype, device=device, wrap=as_cut)
    return replace(loaded, source=os.fspath(source), folder=folder)


def skeleton(folder: Path) -> Any:
    """The model of a folder on the meta device, in its dtype: all of its structure, missing sublayers included, and no
    weights.

    ``folder`` must be in a form that transformers knows (see ``stock_view``)."""
    settings = read_config(folder)
    architecture = next(iter(settings.get("architectures") or []), None)
    stock = getattr(transformers, architecture or "", None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise InputError(
            f"{folder / 'config.json'} names the architecture {architecture}, which transformers does not have"
        )
    try:
        with quiet():
            config = config_of(folder)
            model = on_meta(stock, config)
            return model if getattr(config, "dtype", None) is None else model.to(config.dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be understood: {error}") from error


def on_meta(stock: type, config: Any) -> Any:
    """An instance of ``stock`` on the meta device, cut as ``config`` lists. Eval mode."""
    with torch.device("meta"), quiet():
        return as_cut(stock)(config).eval()


def as_cut(stock: type) -> type:
    """A class whose instances are those of ``stock``, without the sublayers that their config skips, with the widths
    and ranks that it lists, and with the blocks that it says share weights.

    Instances become plain ``stock`` ones as soon as they are made, so that transformers treats them as its own.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        if declares_cuts(config.to_dict()):
            anatomy = discover(self)
            form = read_form(config, anatomy)
            narrow(self, anatomy, _any_units(form, anatomy), setattr)
            add_biases(self, [f"{anatomy.block(block).path}.{path}" for block, path in sorted(form.biases)])
            linears, mixtures = _in_two(form, anatomy)
            for (block, path), rank in form.ranks.items():
                if path == BRIDGE:
                    build_bridge(self.get_submodule(anatomy.block(block).path), _width(anatomy, block), rank)
            empty(self, linears)
            empty_experts(self, mixtures)
            drop(self, anatomy, form.skips, Undo())
            share(self, anatomy, form.shared)
        self.__class__ = stock

    return type(stock.__name__, (stock,), {"__init__": __init__, "__module__": stock.__module__})


def _any_units(form: Form, anatomy: Anatomy) -> list[Keep]:
    """Keeps that leave tensors of the right sizes, which the file then fills."""
    for (address, kind), number in form.widths.items():
        count = next(inner.count for inner in anatomy.inner[address] if inner.kind == kind)
        if number > count:
            raise InputError(f"config.json gives {address} {number} {kind}s, where its plain values make {count}")
    return [
        Keep.model_validate({"unit": address, "inner": kind, "indices": tuple(range(number))})
        for (address, kind), number in form.widths.items()
    ]


def _in_two(form: Form, anatomy: Anatomy) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Path and rank of each linear in two parts, and of each mixture. InputError for one that the stock class does not
    have."""
    outlines = dict(anatomy.outline.blocks())
    found: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for (block, path), rank in form.ranks.items():
        parts = outlines[block].sublayers.values()
        useful = {name: most for part in parts for name, most in part.useful.items()} | {BRIDGE: _width(anatomy, block)}
        if rank > useful.get(path, 0):
            raise InputError(
                f"config.json gives {path} of {block} rank {rank}; this {anatomy.family} model cannot have it"
            )
        if path != BRIDGE:
            found[any(path in part.mixtures for part in parts)].append((f"{anatomy.block(block).path}.{path}", rank))
    return found


def _width(anatomy: Anatomy, block: Address) -> int:
    return anatomy.outline.stack(block.stack).hidden_size


@contextmanager
def stock_view(folder: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder with the same files and a ``config.json`` that transformers understands.

    That is ``folder`` itself unless it is in the DeciLM form, whose ``block_configs`` become ``per_layer_config``.
    """
    stock = settings.get(STOCK)
    if stock is None:
        yield folder
        return
    blocks = settings.get("block_configs")
    try:
        layers = {str(i): _layer(block, settings) for i, block in enumerate(blocks)}  # type: ignore[arg-type]
        view = {key: value for key, value in settings.items() if key not in (STOCK, "block_configs", "auto_map")}
        view |= {key: stock[key] for key in ("model_type", "architectures")}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'} is not in the DeciLM form that Billhook writes: {error!r}"
        ) from error
    view[PER_LAYER] = {i: layer for i, layer in layers.items() if layer}
    view[READ_GLOBALLY] = True
    with tempfile.TemporaryDirectory() as temporary:
        for path in folder.iterdir():
            if path.name != "config.json":
                (Path(temporary) / path.name).symlink_to(path.resolve())
        (Path(temporary) / "config.json").write_text(json.dumps(view), encoding="utf-8")
        yield Path(temporary)


def _layer(block: dict[str, dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    parts = {"attention": block["attention"], "mlp": block["ffn"]}
    skip = [kind for kind, part in parts.items() if part.get("no_op")]
    width = block["ffn"].get("intermediate_size")
    own = {} if width in (None, settings["intermediate_size"]) else {"intermediate_size": width}
    return own | ({"skip": skip} if skip else {})
