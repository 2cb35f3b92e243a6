"""The inner units of an MLP: its neurons, or the experts of a mixture."""

from __future__ import annotations

from billhook.anatomy.families import FUSED_GATE_UP
from billhook.anatomy.roles import NotUnderstood
from billhook.anatomy.tensors import Work
from billhook.anatomy.types import Inner
from billhook.anatomy.vocabulary import EXPERTS, NEURONS, ROUTERS, SHARED_EXPERTS


def neurons(work: Work) -> Inner:
    """Neuron j: row j of every linear that reads (gate and up, one above the other where they are fused), with its
    biases, and column j of the one that writes."""
    if len(work.sublayer.writes) != 1:
        raise NotUnderstood("it writes through several linears")
    write = work.sublayer.writes[0]
    count = work.inputs(write)
    slices = work.columns(write, 1)
    for read in work.sublayer.reads:
        halves = 2 if work.config.model_type in FUSED_GATE_UP else 1
        if work.outputs(read) != halves * count:
            raise NotUnderstood(f"{read} has {work.outputs(read)} outputs, which are not the {count} inputs of {write}")
        slices += work.rows(read, 1, range(0, halves * count, count))
    work.account()
    stack = work.sublayer.address.stack
    key = work.stated((f"{stack}_ffn_dim", *NEURONS), count)
    if key is None and vars(work.saved).get("n_inner", 0) is None:
        key = "n_inner"  # the size follows from the hidden size unless it is given
    return Inner(
        "neuron",
        count,
        tuple(slices),
        (*work.linear_sizes(slices), *work.sizes(count, neurons=(NEURONS, count))),
        ((key, 1),) if key else (),
    )


def experts(work: Work) -> Inner:
    """Expert e: entry e of all tensors of ``experts``, its row of the router and its entry of the router's biases.

    A router that picks experts within groups needs groups of equal size, with enough experts in each: it adds up the
    best two of each group (DeepSeek-V3, section 2.1.2) and picks among those of its best groups.

    The neurons of experts are no units: neuron j of one expert has nothing to do with neuron j of another.
    """
    path = work.expert_lists()[0]
    above = path.rpartition(".")[0]
    inside = [name for name in work.left if name.startswith(f"{path}.")]
    if len(work.expert_lists()) > 1 or any("." in name.removeprefix(f"{path}.") for name in inside):
        raise NotUnderstood("its experts are modules of their own")
    count = int(work.left[inside[0]].shape[0])
    slices = []
    for name in inside:
        if work.left[name].shape[0] != count:
            raise NotUnderstood(f"{name} has no entry an expert")
        slices += work.entries(name, 1, writes=name in work.sublayer.writes)
    routers = [p for p in work.modules if p.rpartition(".")[2] in ROUTERS and p.rpartition(".")[0] == above]
    if len(routers) != 1:
        raise NotUnderstood("it has no router that is known")
    router = work.modules[routers[0]]
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        if tensor.shape[0] != count:
            raise NotUnderstood(f"{routers[0]}.{name} has no entry an expert")
        slices += work.entries(f"{routers[0]}.{name}", 1)
    work.stays(*[n for n in work.left if n.removeprefix(f"{above}.").partition(".")[0] in SHARED_EXPERTS])
    work.account()
    key = work.stated(EXPERTS, count)
    picked = int(work.config.num_experts_per_tok)
    parts = int(getattr(work.config, "n_group", None) or 1)
    least = parts * max(2, -(-picked // int(work.config.topk_group))) if hasattr(work.config, "n_group") else picked
    return Inner(
        "expert",
        count,
        tuple(slices),
        (*work.linear_sizes(slices), *work.sizes(count, experts=(EXPERTS, count))),
        ((key, 1),) if key else (),
        least=least,
        parts=parts,
    )
