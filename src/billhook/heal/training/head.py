"""A language model in two halves: the stream as its head reads it, and the head on any piece of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from billhook.measure.patch import hooked, overridden, stream_out

Head = Callable[[Tensor], Tensor]


def halves(model: Any, ids: Tensor, watched: Iterable[nn.Module] = ()) -> tuple[Tensor, Head, list[Tensor]]:
    """Run the trunk once over ``ids`` [rows, tokens]: what the head is given [rows, tokens, hidden], the head as a
    function [n, hidden] -> [n, vocabulary], and the stream after each watched block.

    The head is the model's own forward with the trunk's output handed to it, so scaling and soft-capping of logits are
    done whoever does them. Gradients flow through both halves. Logits are never made for more than one piece at once.
    """
    trunk, head = model.get_decoder(), model.get_output_embeddings()
    outputs: list[Any] = []
    given: list[Tensor] = []
    streams: list[Tensor] = []

    def note(_module: nn.Module, args: Any) -> Any:
        given.append(args[0])
        return (args[0][:, :0], *args[1:])

    def keep(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        outputs.append(output)

    def see(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        streams.append(stream_out(output))

    noting = head.register_forward_pre_hook(note)
    try:
        with hooked([(trunk, keep), *((block, see) for block in watched)]):
            model(ids, use_cache=False)
    finally:
        noting.remove()

    def logits(piece: Tensor) -> Tensor:
        put = head.register_forward_pre_hook(lambda _, args: (piece[None], *args[1:]))
        try:
            with overridden([(trunk, lambda *_args, **_kwargs: outputs[0])]):
                result: Tensor = model(ids, use_cache=False).logits
        finally:
            put.remove()
        return result[0]

    return given[0], logits, streams
