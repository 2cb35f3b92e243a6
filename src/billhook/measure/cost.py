"""What a model costs, computed from its outline: parameters, file size, FLOPs, KV cache, blocks. No clock, no weights.

Every kind is additive over units: what a drop saves does not depend on the other drops, except that a block is only
gone when all of it is. So a search can ask for thousands of candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from billhook.plan.address import Address
from billhook.plan.channels import channel_counts
from billhook.plan.check import normalise
from billhook.plan.outline import BlockOutline, Outline, StackOutline, SublayerOutline
from billhook.plan.plan import Factorise, HiddenChannels, Keep
from billhook.plan.record import Quantity

Costs = dict[str, float]
UNITS = {
    "params": "parameters",
    "size": "bytes",
    "memory": "bytes",
    "flops": "FLOPs",
    "kv_bytes": "bytes per token",
    "blocks": "blocks",
}
_RUN = ("flops", "kv_bytes", "blocks")  # what a block costs each time it runs
PROMPT_TOKENS = 512
NEW_TOKENS = 128


class CostModel:
    """The costs of a model and of its units for one workload: batch 1, a prompt, then greedy tokens with a cache.

    - ``params``: parameters inside the blocks; zeros that a mask sets do not count. They save nothing else: they are
      stored and multiplied with like any weight, unless an engine has kernels for them.
    - ``size``: bytes of the weights in a file, header aside; tied weights once, all in the average stored width.
    - ``memory``: bytes of the weights and of the cache at the end; what is computed in between is left out.
    - ``flops``: two per weight and token (embeddings aside; of a mixture only the experts that a token uses) and four
      per head channel and query-key pair, for the pairs that the mask allows (Kaplan et al. 2020, section 2.1, who
      count every pair). The head runs once per produced token. Norms, rotations, activation functions and the
      expansion of a cached latent (done anew for the whole cache by some implementations) are left out.
    - ``kv_bytes``: bytes of the cache at the end, over its positions. A sliding window of w holds the last w - 1,
      cross-attention the prompt only. The cache has the width of the stored weights.
    - ``blocks``: how many there are.

    A stack with cross-attention reads ``prompt_tokens`` from the stack beside it and produces ``new_tokens`` itself;
    every other stack reads the prompt, and a causal one goes on from there, the last token produced being never read.
    ``new_tokens`` 0 is one pass over the prompt and costs what producing one token does.
    """

    def __init__(self, outline: Outline, *, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS) -> None:
        self.outline = outline
        self._workload = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        self._prompt, self._new = prompt_tokens, max(new_tokens, 1)
        self._source = next((s.hidden_size for s in outline.stacks if not s.causal), 0)
        crossed = any(_crosses(stack) for stack in outline.stacks)
        self.positions = prompt_tokens + (self._new if crossed else self._new - 1)
        self._shares: dict[Address, Costs] = {}
        self._parts: dict[Address, frozenset[Address]] = {}
        for stack in outline.stacks:
            for index, block in enumerate(stack.blocks):
                self._add(Address(stack.name, index), block, stack)
        self.dense: Costs = dict.fromkeys(UNITS, 0.0)
        self.dense["size"] = self.dense["memory"] = outline.other_params * outline.bytes_per_param
        self.dense["flops"] = 2.0 * outline.head_params * self._new
        for block_address in self._parts:
            self.dense = _plus(self.dense, self._shares[block_address], 1)

    def of(
        self,
        drops: Iterable[Address],
        keeps: Iterable[Keep] = (),
        zeros: Mapping[Address, int] | None = None,
        factors: Iterable[Factorise] = (),
        channels: Iterable[HiddenChannels] = (),
    ) -> Costs:
        """The costs with these units dropped, these sublayers narrowed, these linears in two parts, these streams
        narrower, and so many ``zeros`` in the sublayers that stay."""
        if left := channel_counts(channels):
            return CostModel(self.outline.thinned(left), **self._workload).of(drops, keeps, zeros, factors)
        costs = self.dense
        for unit in sorted(normalise(drops, self.outline)):
            costs = _plus(costs, self._shares[unit], -1)
        changed: dict[Address, SublayerOutline] = {}
        for keep in keeps:
            whole = changed.get(keep.unit) or self._drawn(keep.unit)
            changed[keep.unit] = whole.narrowed(keep.inner, len(keep.indices))
        for edit in factors:
            whole = changed.get(edit.unit) or self._drawn(edit.unit)
            changed[edit.unit] = whole.factorised(edit.linear, edit.rank)
        for unit, sublayer in changed.items():
            stack = self.outline.stack(unit.stack)
            costs = _plus(costs, self._shares[unit], -1)
            costs = _plus(costs, self._share(sublayer, unit.sublayer == "cross_attention", stack), 1)
        return _plus(costs, {"params": float(sum((zeros or {}).values()))}, -1)

    def _drawn(self, unit: Address) -> SublayerOutline:
        return self.outline.stack(unit.stack).blocks[unit.block].sublayers[str(unit.sublayer)]

    def saving(self, unit: Address, drops: Set[Address] = frozenset()) -> Costs:
        """What dropping ``unit`` saves when ``drops`` are gone already: ``of(drops) - of(drops | {unit})``, at once."""
        block = unit.parent
        if unit in drops or block in drops:
            return dict.fromkeys(UNITS, 0.0)
        gone = self._parts[block] & drops
        if unit != block:
            left = self._parts[block] - gone - {unit}
            completes = not left and block in normalise(self._parts[block], self.outline)
            return _plus(self._shares[unit], {"blocks": float(completes)}, 1)
        saved = self._shares[block]
        for part in sorted(gone):
            saved = _plus(saved, self._shares[part], -1)
        if gone == self._parts[block] and block in normalise(gone, self.outline):
            return dict.fromkeys(UNITS, 0.0)
        return saved

    def _add(self, address: Address, block: BlockOutline, stack: StackOutline) -> None:
        total = {**dict.fromkeys(UNITS, 0.0), "blocks": 1.0}
        bytes_of_rest = block.rest_params * self.outline.bytes_per_param
        rest = {"params": float(block.rest_params), "size": bytes_of_rest, "memory": bytes_of_rest}
        parts = {Address(address.stack, address.block, kind): sub for kind, sub in block.sublayers.items()}
        for part, sublayer in parts.items():
            self._shares[part] = self._share(sublayer, part.sublayer == "cross_attention", stack)
            total = _plus(total, self._shares[part], 1)
        if block.bridge_params:
            rest["flops"] = 2.0 * block.bridge_params * self._queries(stack)
        self._shares[address] = _plus(total, rest, 1)
        self._parts[address] = frozenset(parts)

    def _queries(self, stack: StackOutline) -> int:
        return self._new if _crosses(stack) else self.positions if stack.causal else self._prompt

    def _share(self, sublayer: SublayerOutline, cross: bool, stack: StackOutline) -> Costs:
        queries = self._queries(stack)
        keys = self._prompt if cross else queries
        causal = stack.causal and not cross
        # Cross-attention makes the keys and values of the prompt once, not again for every token.
        once = sublayer.cache_width * (self._source or stack.hidden_size) if cross else 0
        weights = (sublayer.active_params - once) * queries + once * self._prompt
        pairs = _pairs(queries, keys, sublayer.window, causal) * sublayer.heads * sublayer.head_dim
        held = min(keys, (sublayer.window or keys + 1) - 1) * sublayer.cache_width
        stored, cached = (values * self.outline.bytes_per_param for values in (sublayer.params, held))
        return {
            "params": float(sublayer.params),
            "size": stored,
            "memory": stored + cached,
            "flops": 2.0 * weights + 4.0 * pairs,
            "kv_bytes": cached / self.positions,
            "blocks": 0.0,
        }


def cost(
    outline: Outline,
    drops: Iterable[Address] = (),
    keeps: Iterable[Keep] = (),
    zeros: Mapping[Address, int] | None = None,
    factors: Iterable[Factorise] = (),
    channels: Iterable[HiddenChannels] = (),
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> Costs:
    """Every kind of cost of a model with these units dropped, these sublayers narrowed, these linears in two parts and
    these streams narrower; see CostModel for what is counted."""
    model = CostModel(outline, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    return model.of(drops, keeps, zeros, factors, channels)


def quantities(
    outline: Outline,
    drops: Iterable[Address],
    keeps: Iterable[Keep] = (),
    zeros: Mapping[Address, int] | None = None,
    factors: Iterable[Factorise] = (),
    again: Iterable[Address] = (),
    channels: Iterable[HiddenChannels] = (),
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Quantity]:
    """The costs before and after, for the record of a run. ``again``: blocks that run once more with the same weights
    (named as often as that). They save nothing of FLOPs, cache and blocks, and cost no parameters and no bytes."""
    model = CostModel(outline, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    drops, keeps, factors, channels = frozenset(drops), tuple(keeps), tuple(factors), tuple(channels)
    after = left = model.of(drops, keeps, zeros, factors, channels)
    for block in again:
        own = tuple(factor for factor in factors if factor.unit.parent != block)
        without = model.of(drops | {block}, (keep for keep in keeps if keep.unit.parent != block), zeros, own, channels)
        run = {k: left[k] - without[k] for k in _RUN}
        run["memory"] = run["kv_bytes"] * model.positions
        after = {k: cost + run.get(k, 0.0) for k, cost in after.items()}
    return {k: Quantity(unit=UNITS[k], dense=model.dense[k], compressed=after[k]) for k in UNITS}


def path_costs(
    outline: Outline, parameters: int, *, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS
) -> Costs:
    """What paths with so many parameters cost beside the linears of a decoder."""
    stored = parameters * outline.bytes_per_param
    positions = CostModel(outline, prompt_tokens=prompt_tokens, new_tokens=new_tokens).positions
    return {"params": float(parameters), "size": stored, "memory": stored, "flops": 2.0 * parameters * positions}


def _crosses(stack: StackOutline) -> bool:
    return any("cross_attention" in block.sublayers for block in stack.blocks)


def _pairs(queries: int, keys: int, window: int | None, causal: bool) -> int:
    """How many query-key pairs a mask allows; a window of w keys on both sides is taken as w keys for each query."""
    width = min(window or keys, keys)
    return queries * width - (width * (width - 1) // 2 if causal else 0)


def _plus(costs: Costs, other: Costs, sign: int) -> Costs:
    return {kind: value + sign * other.get(kind, 0.0) for kind, value in costs.items()}
