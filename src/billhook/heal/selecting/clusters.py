"""What kinds of text there are: groups of windows that the dense model sees alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.linalg import eigh
from scipy.spatial.distance import pdist, squareform

MOST = 12


def clusters(points: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """The number of the group of each of ``points`` [n, d], from 0 on without a gap.

    Spectral clustering on the diffusion kernel exp(-|x - y|^2 / 2 s^2), s the median distance: k-means on the rows of
    the k leading eigenvectors of D^-1/2 A D^-1/2, scaled to length one; k, from 2 to 12, is where the gap between
    two eigenvalues is widest. Equal points are one group. Cost: n^2 distances and n x n eigenvectors, seconds for a few
    thousand points; memory 3 n^2 x 8 bytes.

    Source: PASER (arXiv 2502.12594), section 3.2: diffusion kernel, then spectral clustering, by non-negative
    factorisation of the similarities; here by k-means (Ng, Jordan and Weiss 2001), which ``scipy`` has.
    """
    count = len(points)
    apart = pdist(points)
    middle = float(np.median(apart)) if len(apart) else 0.0
    if count < 4 or middle == 0:
        return np.zeros(count, np.int64)
    alike = np.exp(-(squareform(apart) ** 2) / (2 * middle**2))
    scale = 1 / np.sqrt(alike.sum(axis=1))
    most = min(MOST, count // 2)
    values, vectors = eigh(alike * scale * scale[:, None], subset_by_index=(count - most - 1, count - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    groups = 2 + int(np.argmax(values[1:most] - values[2 : most + 1]))
    rows = vectors[:, :groups]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    _, found = kmeans2(rows, groups, minit="++", rng=np.random.default_rng(seed))
    return np.unique(found, return_inverse=True)[1].astype(np.int64)
