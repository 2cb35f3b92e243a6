"""What the tests of the run time share."""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES, build
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.runtime.fewer_neurons import neurons_of
from billhook.runtime.neuron_experts import NeuronExperts

#: Families that generate text, their models in a fixed state: nothing in these tests changes a weight.
GENERATING = [name for name, family in FAMILIES.items() if family.generates]
NEW = 5


def ready(name: str) -> tuple[PreTrainedModel, Anatomy, dict[str, Any]]:
    """The model, its anatomy, and a prompt of two rows, the second one padded on the left where the family pads."""
    family = FAMILIES[name]
    model = family.build()
    return model, discover(model), family.prompt(model, 2, "left" if family.pads else None)


def for_one_kind() -> PreTrainedModel:
    """A model whose block 3 writes only where a token of the first kind was read (numbers below 50)."""
    model = build("llama")
    with torch.no_grad():
        kind = torch.zeros(36)
        kind[5] = 6.0
        table = model.get_input_embeddings().weight
        table[:50] += kind
        table[50:] -= kind
        layer = model.model.layers[3]
        layer.input_layernorm.weight.zero_()
        layer.post_attention_layernorm.weight.zero_()
        layer.post_attention_layernorm.weight[5] = 3.0
        layer.mlp.gate_proj.weight.zero_()
        layer.mlp.gate_proj.weight[:, 5] = 4.0  # silu: nothing where the channel is negative
    return model


def generate(model: PreTrainedModel, prompt: dict[str, Any], **settings: Any) -> tuple[Tensor, Tensor]:
    """Greedy ids [rows, length], and the logits of every step [steps, rows, vocabulary]."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True} | settings
    with torch.no_grad():
        # the mixin's own: Whisper's takes the cache apart afterwards
        out = GenerationMixin.generate(model, **prompt, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences, torch.stack(out.logits)


def equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def state(model: PreTrainedModel) -> list[Any]:
    """Everything of a live model that a policy could leave behind."""
    found: list[Any] = [model.config.to_dict(), sorted(vars(model))]
    for name, module in model.named_modules():
        own = {k: id(v) for k, v in vars(module).items() if k == "forward" or isinstance(v, nn.Module)}
        hooks = [len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        found.append((name, id(module), own, hooks, getattr(module, "layer_idx", None)))
    return found


def drawn_experts(anatomy: Anatomy, *, keep: float, experts: int = 3) -> NeuronExperts:
    """Experts that are drawn, with a router that sends about as many tokens to each."""
    draw = torch.Generator().manual_seed(6)
    hidden = anatomy.outline.stack("decoder").hidden_size
    weight, bias = torch.randn(experts, hidden, generator=draw), 3 * torch.randn(experts, generator=draw)
    tensors = {"router.weight": weight, "router.bias": bias}
    for address, neurons in neurons_of(anatomy).items():
        tensors[f"{address}.worth"] = torch.rand(experts, neurons.count, generator=draw)
    return NeuronExperts(keep=keep, experts=experts).with_tensors(tensors)
