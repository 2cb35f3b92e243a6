"""The part of a heterogeneous checkpoint's Python file that gives linears a bias."""

from __future__ import annotations

from pprint import pformat
from string import Template

from billhook.anatomy import Anatomy
from billhook.surgery.form import Form

_BIAS = Template('''\
# one row a stack: name, path of its blocks, of its config
BIASES: Any = $rows


def bias(model: nn.Module, name: str, path: str, owner: str) -> None:
    """Give each linear a bias that the config lists."""
    listed = getattr(reduce(getattr, owner.split("."), model), "added_biases", {}).get(name, {})
    for index, linears in listed.items():
        for inside in linears:
            linear: Any = model.get_submodule(f"{path}.{index}.{inside}")
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))''')


def biasing(anatomy: Anatomy, form: Form) -> str:
    """The source; ``anatomy`` is that of the stock class."""
    used = {block.stack for block, _ in form.biases}
    rows = [(stack.name, stack.path, stack.counters[0].owner) for stack in anatomy.stacks if stack.name in used]
    return _BIAS.substitute(rows=pformat(rows, width=116, sort_dicts=False))
