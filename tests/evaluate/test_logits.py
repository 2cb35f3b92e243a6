import pytest
import torch
from families import FAMILIES, LENGTH, build

from billhook.anatomy import discover
from billhook.evaluate.logits import logits_by_slice

CAUSAL = [name for name, family in FAMILIES.items() if family.generates and list(family.stacks) == ["decoder"]]


@pytest.mark.parametrize("name", [*CAUSAL, "gemma3_image"])
@torch.no_grad()
def test_slices_are_the_models_own_logits(name):
    """Also where the family scales or caps its logits, or projects its stream before the head."""
    model = build(name)
    ids = torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    at = logits_by_slice(model, ids)
    sliced = torch.cat([at(slice(0, 4)), at(slice(4, 5)), at(slice(5, LENGTH))], dim=1)
    torch.testing.assert_close(sliced, model(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_blocks_run_once_and_the_head_sees_only_the_slice():
    model = build("llama")
    runs, widths = [], []
    model.get_submodule(discover(model).stack("decoder").blocks[0].path).register_forward_hook(
        lambda *_: runs.append(1)
    )
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: widths.append(out.shape[1]))
    at = logits_by_slice(model, torch.arange(9)[None])
    at(slice(0, 3)), at(slice(3, 8))
    assert len(runs) == 1
    assert widths == [0, 3, 5]


@torch.no_grad()
def test_leaves_no_trace():
    model = build("llama")
    ids = torch.arange(9)[None]
    before = model(ids).logits
    at = logits_by_slice(model, ids)
    at(slice(0, 3))
    with pytest.raises(TypeError):
        at("not a slice")
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert torch.equal(model(ids).logits, before)
