"""What a saved model has that its stock class, built from the plain values of its config, would not have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from billhook.anatomy import Anatomy
from billhook.plan.address import Address
from billhook.plan.plan import Keep
from billhook.plan.visits import Orders
from billhook.plan.widths import Counts
from billhook.surgery.sharing import Shared, read_shared, shared_after, write_shared
from billhook.surgery.skips import read_skips, skips_after, write_skips
from billhook.surgery.widths import clear_widths, read_widths, widths_after, write_widths


@dataclass(frozen=True)
class Form:
    """``skips`` are sublayers that are missing; ``widths`` how many inner units others have; ``shared`` the blocks that
    have the weights of an earlier one. False if there is none of it: an ordinary checkpoint."""

    skips: frozenset[Address] = frozenset()
    widths: Counts = field(default_factory=dict)
    shared: Shared = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.skips or self.widths or self.shared)


def read_form(config: Any, anatomy: Anatomy) -> Form:
    """What a model's config lists. InputError if it lists something that the model has no place for."""
    return Form(read_skips(config, anatomy), read_widths(config, anatomy), read_shared(config, anatomy))


def form_after(config: Any, drops: frozenset[Address], keeps: Iterable[Keep], orders: Orders, anatomy: Anatomy) -> Form:
    """What is missing, narrower or shared once a plan is carried out, in the block numbers of the smaller model.
    ``config`` is that of the model before, ``anatomy`` describes it."""
    before = read_form(config, anatomy)
    skips = skips_after(before.skips, drops, orders)
    return Form(skips, widths_after(before.widths, drops, keeps, orders), shared_after(orders))


def write_form(config: Any, anatomy: Anatomy, form: Form) -> Form:
    """Note a form in a config whose plain values already are those of the smaller model, in place. Returns what is left
    of it: widths that the plain values say need no note."""
    clear_widths(config, anatomy)
    write_skips(config, anatomy, form.skips)
    write_shared(config, anatomy, form.shared)
    return Form(form.skips, write_widths(config, anatomy, form.widths), form.shared)
