"""Which tokens of a text stand for something that was seen."""

from __future__ import annotations

from transformers import PreTrainedModel

_SEEN = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def vision_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids of the tokens that a model replaces by parts of images and videos; empty where it reads text alone."""
    found = {getattr(model.config, name, None) for name in _SEEN}
    return tuple(sorted(token for token in found if isinstance(token, int)))
