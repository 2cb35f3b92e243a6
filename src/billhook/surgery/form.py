"""What a saved model has that its stock class, built from the plain values of its config, would not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from billhook.anatomy import Anatomy
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Factorise, Keep
from billhook.plan.ranks import Ranks
from billhook.plan.visits import Orders
from billhook.plan.widths import Counts
from billhook.surgery.biases import Biases, biases_after, read_biases, write_biases
from billhook.surgery.ranks import ranks_after, read_ranks, write_ranks
from billhook.surgery.sharing import Shared, read_shared, shared_after, write_shared
from billhook.surgery.skips import read_skips, skips_after, write_skips
from billhook.surgery.widths import clear_widths, read_widths, widths_after, write_widths


@dataclass(frozen=True)
class Form:
    """``skips`` are sublayers that are missing; ``widths`` how many inner units others have; ``ranks`` those of linears
    in two parts; ``biases`` are linears that have one where others have none; ``shared`` the blocks that have the
    weights of an earlier one. False if there is none of it: an ordinary checkpoint."""

    skips: frozenset[Address] = frozenset()
    widths: Counts = field(default_factory=dict)
    ranks: Ranks = field(default_factory=dict)
    biases: Biases = frozenset()
    shared: Shared = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.skips or self.widths or self.ranks or self.biases or self.shared)


def read_form(config: Any, anatomy: Anatomy) -> Form:
    """What a model's config lists. InputError if it lists something that the model has no place for."""
    skips, widths = read_skips(config, anatomy), read_widths(config, anatomy)
    ranks, biases = read_ranks(config, anatomy), read_biases(config, anatomy)
    return Form(skips, widths, ranks, biases, read_shared(config, anatomy))


def form_after(
    config: Any,
    drops: frozenset[Address],
    keeps: Iterable[Keep],
    orders: Orders,
    anatomy: Anatomy,
    factors: Sequence[Factorise] = (),
) -> Form:
    """What is missing, narrower, in two parts or shared once a plan is carried out, in the block numbers of the smaller
    model. ``config`` is that of the model before, ``anatomy`` describes it."""
    before = read_form(config, anatomy)
    if shared_after(orders) and (before.ranks or before.biases or factors):
        raise InputError("blocks cannot share weights where linears are in two parts or have biases of their own")
    skips, widths = skips_after(before.skips, drops, orders), widths_after(before.widths, drops, keeps, orders)
    ranks = ranks_after(before.ranks, drops, factors, anatomy)
    return Form(skips, widths, ranks, biases_after(before.biases, drops, anatomy), shared_after(orders))


def write_form(config: Any, anatomy: Anatomy, form: Form) -> Form:
    """Note a form in a config whose plain values already are those of the smaller model, in place. Returns what is left
    of it: widths that the plain values say need no note."""
    clear_widths(config, anatomy)
    write_skips(config, anatomy, form.skips)
    write_ranks(config, anatomy, form.ranks)
    write_biases(config, anatomy, form.biases)
    write_shared(config, anatomy, form.shared)
    return Form(form.skips, write_widths(config, anatomy, form.widths), form.ranks, form.biases, form.shared)
