"""Which single weights of the tensors in a checkpoint become zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from billhook.plan.errors import InputError
from billhook.plan.masks import Packed, pack, unpack
from billhook.surgery.masks import Masks
from billhook.surgery.names import stored_parts
from billhook.surgery.shards import Headers, Stored


def thinned(headers: Headers, live: Mapping[str, str | None], dense: Any, masks: Masks) -> Headers:
    """The same tensors with a note of their masks. A mask of a tensor that the model keeps fused is taken apart as the
    model itself would be in saving. InputError where a masked tensor is stored in yet another way."""
    shapes = {name: tuple(dense.get_parameter(name).shape) for name in masks}
    stored = {name: entry for tensors, _ in headers.values() for name, entry in tensors.items()}
    noted: dict[str, Packed] = {}
    for name, packed in masks.items():
        mine = {s: e for s, e in stored.items() if live[s] == name}
        if len(mine) == 1 and next(iter(mine.values())).shape == shapes[name]:
            noted[next(iter(mine))] = packed
            continue
        parts = stored_parts(dense, name, torch.from_numpy(unpack(packed, shapes[name])))
        for part, mask in parts.items():
            if part not in stored or stored[part].shape != tuple(mask.shape):
                raise InputError(
                    f"{name} is stored in a form from which single weights cannot be taken on disk; "
                    f"billhook compress does it in memory"
                )
            noted[part] = pack(mask.numpy())
        if mine.keys() - parts.keys():
            raise InputError(f"{min(mine.keys() - parts.keys())} is a part of {name} that no mask was found for")

    def note(entry: Stored) -> Stored:
        return replace(entry, mask=noted[entry.name]) if entry.name in noted else entry

    return {path: ({n: note(s) for n, s in tensors.items()}, extra) for path, (tensors, extra) in headers.items()}
