"""How the numbers in a config read when blocks are gone, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from billhook.anatomy.config import shortened


def after(kept: list[int], blocks: int, **values: Any) -> dict[str, Any]:
    return shortened(SimpleNamespace(**values), ("num_hidden_layers",), kept, blocks)


def test_lists_with_an_entry_a_block_keep_the_right_ones_and_others_stay() -> None:
    found = after([0, 2, 3], 4, layer_types=["a", "b", "c", "d"], image_mean=[1, 2, 3, 4], pair=(1, 2))
    assert found == {"num_hidden_layers": 3, "layer_types": ["a", "c", "d"]}


@pytest.mark.parametrize(("kept", "left"), [([0, 2, 3, 5, 6], 2), ([0, 1, 2, 3], 0), ([3, 4, 5, 6], 3)])
def test_a_count_of_the_last_blocks_counts_what_is_left_of_them(kept: list[int], left: int) -> None:
    assert after(kept, 7, num_kv_shared_layers=3)["num_kv_shared_layers"] == left


@pytest.mark.parametrize(("kept", "left"), [([1, 2, 4], 1), ([2, 3], 0), ([0, 1, 2], 2)])
def test_a_count_of_the_first_blocks_counts_what_is_left_of_them(kept: list[int], left: int) -> None:
    assert after(kept, 5, first_k_dense_replace=2)["first_k_dense_replace"] == left


def test_every_second_block_sparse_becomes_a_list_of_the_dense_ones() -> None:
    """Blocks 1, 3 and 5 would be sparse, but 1 is listed as dense."""
    found = after([0, 1, 3, 4, 5], 6, decoder_sparse_step=2, mlp_only_layers=[1])
    assert (found["decoder_sparse_step"], found["mlp_only_layers"]) == (1, [0, 1, 3])
    assert "decoder_sparse_step" not in after([0, 1], 3, decoder_sparse_step=1, mlp_only_layers=[1])


def test_a_backbone_hands_on_the_stream_from_the_same_places() -> None:
    """Stage i comes after block i - 1: after block 0, which stays, and after the last one."""
    names = ["stem", "stage1", "stage2", "stage3", "stage4"]
    found = after([0, 2, 3], 4, stage_names=names, _out_indices=[1, -1])
    assert found["stage_names"] == names[:4]
    assert found["_out_indices"] == [1, 3]
    assert found["_out_features"] == ["stage1", "stage3"]
    assert after([1, 2, 3], 4, stage_names=names, _out_indices=[1, -1])["_out_indices"] == [0, 3]
