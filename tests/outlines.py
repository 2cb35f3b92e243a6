"""Anatomies on paper, for everything that only needs to count."""

from __future__ import annotations

from billhook.plan.outline import BlockOutline, Outline, StackOutline, SublayerOutline

HIDDEN = 8
ATTENTION = 100
MLP = 300


def attention(params: int = ATTENTION, *, window: int | None = None, cache_width: int = 8) -> SublayerOutline:
    return SublayerOutline(
        params=params,
        active_params=params,
        heads=2,
        kv_heads=1,
        head_dim=4,
        window=window,
        cache_width=cache_width,
    )


def mlp(params: int = MLP) -> SublayerOutline:
    return SublayerOutline(params=params, active_params=params, neurons=16)


def block(attention_params: int = ATTENTION, mlp_params: int = MLP, rest: int = 0) -> BlockOutline:
    sublayers = {"attention": attention(attention_params), "mlp": mlp(mlp_params)}
    return BlockOutline(sublayers=sublayers, rest_params=rest)


def stack(blocks: int | list[BlockOutline], name: str = "decoder", causal: bool = True) -> StackOutline:
    drawn = [block() for _ in range(blocks)] if isinstance(blocks, int) else blocks
    return StackOutline(name=name, hidden_size=HIDDEN, causal=causal, blocks=tuple(drawn))


def outline(*stacks: StackOutline | int, **fields: object) -> Outline:
    """An outline of the given stacks; a number is a causal stack of so many equal blocks."""
    drawn = tuple(stack(s) if isinstance(s, int) else s for s in stacks)
    given = {"family": "paper", "other_params": 50, "head_params": 40, "bytes_per_param": 2.0, **fields}
    return Outline(stacks=drawn, **given)
