"""Least squares between two depths."""

from __future__ import annotations

import pytest
import torch

from billhook.measure.affine import PENALTIES, Ridge, affine, energy, product


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_an_affine_relation_is_found() -> None:
    x, matrix = draw(200, 8), draw(8, 5, seed=1)
    y = x @ matrix + 3
    found = affine(x, y)
    new = draw(20, 8, seed=2)
    torch.testing.assert_close(found(new), new @ matrix + 3, atol=1e-3, rtol=1e-3)
    assert found(new.bfloat16()).dtype == torch.bfloat16


def test_huge_tokens_do_not_decide() -> None:
    """One token in forty is a thousand times as long and obeys another map."""
    x, matrix = draw(400, 8), draw(8, 8, seed=1)
    y = x @ matrix
    odd = torch.arange(400) % 40 == 0
    x[odd] *= 1000
    y[odd] = -1000 * y[odd]
    new = draw(50, 8, seed=2)
    error = (affine(x, y)(new) - new @ matrix).norm() / (new @ matrix).norm()
    assert error < 0.2


def test_the_penalty_is_that_of_least_generalised_cross_validation() -> None:
    """By its definition with hat matrices, on data for which a penalty in the middle is best."""
    x, y = draw(40, 20), draw(40, 3, seed=1) + 0.5 * draw(40, 20) @ draw(20, 3, seed=2)
    x, y = x - x.mean(0), y - y.mean(0)
    x, y = x.double(), y.double()
    gram = x.T @ x
    criteria, coefficients = [], []
    for penalty in PENALTIES:
        inverse = torch.linalg.inv(gram + penalty * gram.trace() / 20 * torch.eye(20))
        hat = x @ inverse @ x.T
        criteria.append(((y - hat @ y).square().sum() / (39 - hat.trace()) ** 2).item())
        coefficients.append(inverse @ x.T @ y)
    best = min(range(len(PENALTIES)), key=criteria.__getitem__)
    assert 0 < best < len(PENALTIES) - 1
    ridge = Ridge(x.float())
    found = ridge.solve(ridge.cross(y.float()), energy(y))
    torch.testing.assert_close(found, coefficients[best].float(), atol=1e-4, rtol=1e-4)


def test_noise_is_not_explained() -> None:
    x, y = draw(60, 40), draw(60, 4, seed=1)
    assert affine(x, y)(draw(10, 40, seed=2)).norm() < 0.5 * draw(10, 4, seed=3).norm()


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_fewer_tokens_than_unknowns(tokens: int) -> None:
    assert affine(draw(tokens, 8), draw(tokens, 8, seed=1))(draw(3, 8)).isfinite().all()


def test_sums_are_in_float64_whatever_the_pieces() -> None:
    a, b = draw(3000, 4), draw(3000, 3, seed=1)
    torch.testing.assert_close(product(a, b), a.double().T @ b.double(), atol=1e-3, rtol=1e-5)
    assert product(a, b).dtype == torch.float64
    assert energy(a) == pytest.approx(a.double().square().sum().item(), rel=1e-6)
