"""The DeciLM form (Llama-3.x-Nemotron, "Nemotron-NAS"): the one stock road to engines for blocks without attention.

``config.json`` lists in ``block_configs`` what each block has; the weights keep their Llama names. Three readers:

- vLLM, ``models/nemotron_nas.py``, chosen by ``architectures``: reads ``attention.no_op``, ``n_heads_in_group``,
  ``ffn.no_op`` and ``ffn_mult`` if the attribute exists, else ``intermediate_size``, all with dots, hence the config
  class in ``configuration_decilm.py`` (start it with ``--trust-remote-code``); ``model_type`` makes it take the number
  of KV heads from ``block_configs``; ``qkv_bias`` overrides ``attention_bias`` for q, k and v.
- llama.cpp, ``DeciModel`` in its converter, reads the JSON itself: ``n_heads_in_group`` null means no attention,
  ``ffn_mult`` null means no MLP. It knows MLP widths that are multiples of 256 only (``ffn_mult`` is left out
  otherwise, and its converter stops), heads of width hidden_size / heads, and Llama vocabularies.
- transformers, by ``modeling_decilm.py``.

Neither vLLM nor llama.cpp was run on this form: the fields follow their sources as read in 2026, and the tests hold the
fields to what those sources read. The transformers side is run by the tests.
"""

from __future__ import annotations

from typing import Any

from billhook.anatomy import Anatomy
from billhook.export.remote import ABSENT, render
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.surgery.form import Form
from billhook.surgery.reopen import STOCK
from billhook.surgery.skips import PER_LAYER, READ_GLOBALLY

_MODEL_TYPE, _CLASS, _CONFIG = "nemotron-nas", "DeciLMForCausalLM", "DeciLMConfig"
_WIDTH_STEP = 256  # DeciLM rounds an MLP width computed from ffn_mult up to a multiple of this

_CONFIGURATION = '''"""{stock} with block_configs that can be read with dots. Written by Billhook."""

from transformers import {stock}


class Fields(dict):
    def __getattr__(self, name):
        if self.get(name) is None:
            raise AttributeError(name)
        return self[name]


class {name}({stock}):
    model_type = "{model_type}"

    def __init__(self, block_configs=None, **kwargs):
        blocks = [{{part: Fields(fields) for part, fields in block.items()}} for block in block_configs or []]
        self.block_configs = [Fields(block) for block in blocks]
        super().__init__(**kwargs)
'''

_SKIPPED = """def skipped(config: Any, name: str, index: int) -> Any:
    block = config.block_configs[index]
    return [kind for kind, part in (("attention", block.attention), ("mlp", block.ffn)) if part.no_op]"""


_UNITS = """def units(config: Any, name: str, index: int, sublayer: str, kind: str, key: str, amount: int) -> Any:
    return config.block_configs[index].ffn.intermediate_size if kind == "neuron" else None"""


def files(full: Any, anatomy: Anatomy, form: Form) -> dict[str, Any]:
    """The files beside the weights. ``full`` is the stock model (meta device) before ``form`` is carried out,
    ``anatomy`` its anatomy. InputError if a DeciLM loader would compute something else."""
    outline = anatomy.outline.stacks[0]
    windows = [s.window for block in outline.blocks for s in block.sublayers.values() if s.window]
    if windows:
        raise InputError(
            "target deci cannot carry this model: DeciLM loaders know no sliding window, "
            f"it has one of {windows[0]} tokens"
        )
    stock, config_stock = type(full).__name__, type(full.config).__name__
    settings = {
        "architectures": [_CLASS],
        "model_type": _MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"configuration_decilm.{_CONFIG}",
            "AutoModelForCausalLM": f"modeling_decilm.{_CLASS}",
        },
        "block_configs": _block_configs(anatomy, form, full.config.hidden_size),
        "attention_bias": _has_bias(full, anatomy, "o_proj"),
        "qkv_bias": _has_bias(full, anatomy, "q_proj"),
        STOCK: {"model_type": full.config.model_type, "architectures": [stock]},
        PER_LAYER: ABSENT,
        READ_GLOBALLY: ABSENT,
    }
    modeling = render(
        stock,
        anatomy,
        form,
        name=_CLASS,
        skipped=_SKIPPED,
        units=_UNITS,
        imports=f"\nfrom .configuration_decilm import {_CONFIG}\n",
        own=f"config_class = {_CONFIG}",
    )
    configuration = _CONFIGURATION.format(stock=config_stock, name=_CONFIG, model_type=_MODEL_TYPE)
    return {"config.json": settings, "configuration_decilm.py": configuration, "modeling_decilm.py": modeling}


def _block_configs(anatomy: Anatomy, form: Form, hidden: int) -> list[dict[str, dict[str, Any]]]:
    blocks = []
    for address, block in anatomy.outline.blocks():
        attention, mlp = block.sublayers["attention"], block.sublayers["mlp"]
        no_attention, no_mlp = (Address(address.stack, address.block, k) in form.skips for k in ("attention", "mlp"))
        group = None if no_attention else attention.heads // attention.kv_heads
        ffn: dict[str, Any] = {"no_op": no_mlp, "replace_with_linear": False, "sparsify": None}
        if no_mlp:
            ffn |= {"ffn_mult": None, "intermediate_size": None}
        else:
            width = form.widths.get((Address(address.stack, address.block, "mlp"), "neuron"), mlp.neurons)
            ffn["intermediate_size"] = width
            if width % _WIDTH_STEP == 0:
                ffn["ffn_mult"] = 1.5 * width / hidden
        blocks.append(
            {
                "attention": {
                    "no_op": no_attention,
                    "replace_with_linear": False,
                    "sparsify": None,
                    "n_heads_in_group": group,
                    "window_length": None,
                    "num_sink_tokens": None,
                    "use_prefill_window_in_sink_attention": False,
                    "unshifted_sink": False,
                },
                "ffn": ffn,
            }
        )
    return blocks


def _has_bias(model: Any, anatomy: Anatomy, linear: str) -> bool:
    attention = model.get_submodule(anatomy.stacks[0].blocks[0].sublayers[0].module)
    return getattr(attention, linear).bias is not None
