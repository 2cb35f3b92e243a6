"""2:4 weights in the form of sparse kernels: which ones fit, and that a model is as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import LlamaConfig, LlamaForCausalLM

from billhook.evaluate import bench, semi_structured
from billhook.evaluate.memory import tensor_bytes
from billhook.plan.record import Workload

HALF = (torch.float16, torch.bfloat16)
PREFILL = Workload(name="prefill", batch=2, prompt_tokens=7, new_tokens=0)
DECODE = Workload(name="decode", batch=1, prompt_tokens=5, new_tokens=2)
CUDA = torch.cuda.is_available() and semi_structured.has_kernels(torch.device("cuda"))


def pruned(outputs: int, inputs: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """The larger two of each four inputs stay."""
    weight = torch.randn(outputs, inputs // 4, 4, generator=torch.Generator().manual_seed(0))
    smaller = weight.abs().argsort(-1)[..., :2]
    return weight.scatter(-1, smaller, 0).reshape(outputs, inputs).to(dtype)


def model(dtype: torch.dtype = torch.float16, layers: int = 2) -> LlamaForCausalLM:
    """Seven linears a layer, of which k and v have 16 outputs, too few; gate of the first is dense."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    made = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, module in made.named_modules():
        if isinstance(module, nn.Linear) and name not in ("lm_head", "model.layers.0.mlp.gate_proj"):
            module.weight.copy_(pruned(*module.weight.shape, dtype) / 8)
    return made


class OnCPU(SparseSemiStructuredTensorCUTLASS):
    """Torch's own class and its packed form, unpacked where a GPU would multiply."""

    @classmethod
    def packed_from(cls, weight: Tensor) -> SparseSemiStructuredTensorCUTLASS:
        assert weight.is_contiguous()
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        return cls(weight.shape, packed, meta, None, None, None)

    def _mm(self, B: Tensor, *, bias: Tensor | None = None, should_transpose_dense: bool = False) -> Tensor:
        assert should_transpose_dense  # how a linear asks
        return nn.functional.linear(B, sparse_semi_structured_to_dense_cutlass(self.packed, self.meta), bias)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "has_kernels", lambda device: True)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", OnCPU.packed_from)


@pytest.mark.parametrize("dtype", HALF)
def test_what_fits_is_packed_without_loss(dtype: torch.dtype) -> None:
    weight = pruned(64, 192, dtype)
    emptier = weight.clone()
    emptier[:5] = 0
    for fitting in (weight, emptier):
        assert semi_structured.fits(fitting)
        assert torch.equal(
            sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(fitting)), fitting
        )


def test_what_does_not_fit() -> None:
    weight, three = pruned(64, 128), pruned(64, 128)
    three[63, 124:127] = 1.0
    for other in (three, weight.T, weight.float(), weight[0], pruned(48, 128), pruned(64, 96)):
        assert not semi_structured.fits(other)


@pytest.mark.parametrize("backend", [SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT])
@pytest.mark.parametrize("dtype", HALF)
def test_sizes_are_those_that_torch_takes(backend: type, dtype: torch.dtype) -> None:
    least = backend._DTYPE_SHAPE_CONSTRAINTS[dtype]
    assert semi_structured.OUTPUTS % least.sparse_min_rows == semi_structured.INPUTS % least.sparse_min_cols == 0


@pytest.mark.parametrize(
    ("device", "capability", "built", "expected"),
    [("cuda", (8, 0), True, True), ("cuda", (9, 0), True, True), ("cuda", (7, 5), True, False),
     ("cuda", (8, 0), False, False), ("cpu", (8, 0), True, False)],
)  # fmt: skip
def test_where_kernels_are(
    device: str, capability: tuple[int, int], built: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: built)
    assert semi_structured.has_kernels(torch.device(device)) is expected


@torch.no_grad()
def test_the_model_says_the_same_and_is_whole_again(kernels: None) -> None:
    sparse = model()
    ids = torch.arange(12).reshape(2, 6)
    before, weights = sparse(ids).logits, dict(sparse.named_parameters())
    with pytest.raises(RuntimeError, match="on purpose"), semi_structured.semi_structured(sparse) as count:
        assert count == 2 * 5 - 1
        packed = {n for n, m in sparse.named_modules() if isinstance(getattr(m, "weight", None), OnCPU)}
        assert {name.rpartition(".")[2] for name in packed} == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert "model.layers.0.mlp.gate_proj" not in packed
        torch.testing.assert_close(sparse(ids).logits, before, atol=2e-3, rtol=2e-2)
        raise RuntimeError("on purpose")
    after = dict(sparse.named_parameters())
    assert after.keys() == weights.keys() and all(after[name] is weights[name] for name in weights)
    assert torch.equal(sparse(ids).logits, before)


def test_bench_says_where_the_kernels_were(kernels: None) -> None:
    sparse, dense = model(), model()
    for module in dense.modules():
        if isinstance(module, nn.Linear):
            module.weight.add_(0.01)
    for timing in bench(dense, sparse, workloads=[PREFILL, DECODE], rounds=1):
        assert timing.engine.endswith(", 2:4 kernels in 9 linears of the compressed model")
    for timing in bench(sparse, dense, workloads=[PREFILL], rounds=1):
        assert "2:4" not in timing.engine


def test_without_kernels_nothing_is_claimed() -> None:
    (timing,) = bench(model(layers=1), model(layers=1), workloads=[PREFILL], rounds=1)
    assert "2:4" not in timing.engine


def test_bytes_of_a_sparse_weight_are_those_of_its_parts() -> None:
    weight = pruned(64, 128)
    assert tensor_bytes([OnCPU.packed_from(weight)]) == weight.nbytes * 9 // 16


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device of compute capability 8.0 and torch with cuSPARSELt")
@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_on_a_gpu(dtype: torch.dtype) -> None:
    sparse = model(dtype).cuda()
    ids = torch.arange(12, device="cuda").reshape(2, 6)
    before = sparse(ids).logits
    with semi_structured.semi_structured(sparse) as count:
        assert count == 9
        torch.testing.assert_close(sparse(ids).logits, before, atol=2e-2, rtol=5e-2)
    (timing,) = bench(sparse, sparse, workloads=[DECODE], rounds=1)
    assert "2:4 kernels in 9 linears" in timing.engine
