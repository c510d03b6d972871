"""Dynamic mode decomposition (DMD) of a sequence of which only the inner products are known.

    values Y_0 (latest), Y_1, ...  ──►  rates v_j = (Y_j - Y_{j+1}) / steps between  ──►  v_{j-1} = A v_j, least squares
    prediction  Y_0 + w (A + A^2 + ... + A^p) v_0          w: mean spacing in steps,  p: steps to go / w

Schmid 2010 fits `A` to the values themselves. Rates leave out the constant part, which would need a mode. On the
bundled model without guidance (examples/benchmarks/dmd.toml) values gave 48.3 dB in place of 50.1 for the output, 48.1
in place of 51.5 for residuals, and 48.5 in place of 51.9 with a threshold.

`A v_0` lies in the span of the rates, so `A` is never made: its matrix `K` in this span follows from inner products.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NOISE = 1e-10
"""Inner products are exact to this share. Modes that are weaker are rounding."""
MAX_GROWTH = 2.0
"""A mode grows at most by this factor from one rate to the next. Changes that begin suddenly would explode."""


def dmd_weights(
    products: Sequence[Sequence[float]], steps: Sequence[int], step: int, rank: int = 0
) -> tuple[float, ...]:
    """The weights of the values `Y_j` in the prediction for `step`; they sum to 1.

    One value is repeated, two are continued on a line. Values that do not change are repeated, and so is the latest
    value if a product is not finite.

    Args:
        products: for each value, the latest first, the inner products with itself and with the earlier ones.
        steps: the numbers of the values' steps, the latest first.
        step: the number of the step to predict.
        rank: the number of modes, at most; 0 for all.
    """
    count = len(steps)
    gram = np.zeros((count, count))
    for index, row in enumerate(products):
        gram[index, index:] = gram[index:, index] = row[: count - index]
    if count == 1 or not np.isfinite(gram).all():
        return (1.0,)
    rates = _rates(steps)
    spacing = (steps[0] - steps[-1]) / (count - 1)
    distance = (step - steps[0]) / spacing
    latest = np.eye(count - 1)[0]
    if count == 2:
        sums = latest * distance
    else:
        inner = rates.T @ gram @ rates
        sums = _sums(_map(inner, NOISE * np.trace(gram) / spacing**2, rank), distance, latest[:-1])
        sums = np.append(sums, 0.0)
    weights = np.eye(count)[0] + spacing * rates @ sums
    return tuple(weights.tolist())


def _rates(steps: Sequence[int]) -> np.ndarray:
    """Weights of the values in the changes per step: a column for each pair of neighbours, the latest first."""
    rates = np.zeros((len(steps), len(steps) - 1))
    for index, (new, old) in enumerate(zip(steps, steps[1:], strict=False)):
        rates[index, index], rates[index + 1, index] = 1 / (new - old), -1 / (new - old)
    return rates


def _map(inner: np.ndarray, noise: float, rank: int) -> np.ndarray:
    """K: the linear map in the span of all rates but the earliest, from the inner products of the rates.

    With X the rates but the latest and Y the rates but the earliest, `A = Y pinv(X)`, so `A Y = Y K` and
    `K = pinv(X) Y = pinv(X^T X) X^T Y`.
    """
    energies, modes = np.linalg.eigh(inner[1:, 1:])
    kept = energies > max(noise, NOISE * energies[-1])
    if rank:
        kept[:-rank] = False
    inverses = np.divide(1.0, energies, out=np.zeros_like(energies), where=kept)
    return (modes * inverses) @ modes.T @ inner[1:, :-1]


def _sums(matrix: np.ndarray, distance: float, start: np.ndarray) -> np.ndarray:
    """(K + K^2 + ... + K^distance) start, for a distance that need not be whole."""
    values, vectors = np.linalg.eig(matrix)
    values = values.astype(complex) / np.maximum(1.0, np.abs(values) / MAX_GROWTH)
    is_one = np.abs(values - 1) < 1e-6
    others = np.where(is_one, 0, values)
    factors = np.where(is_one, distance, others * (others**distance - 1) / (others - 1))
    shares, *_ = np.linalg.lstsq(vectors, start.astype(complex), rcond=None)
    result: np.ndarray = (vectors @ (factors * shares)).real
    return result
