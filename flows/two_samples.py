"""Two samples: are they draws from one distribution? Tests whose p-values hold whatever that is.

`differences` makes them all on latents and scores, corrected so that together they raise a false alarm no
more often than the level says; the functions below it are the tests.

Legend: N and M rows of the two samples, D columns, P permutations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

PERMUTATIONS = 999
Rows = dict[str, np.ndarray]  # columns by name: mu (N, D) and scores (N,)


@dataclass(frozen=True)
class Finding:
    """A test: `difference` is the distance of two distributions, the MMD, or the change of a mean.

    p is corrected for everything tested: below a level in any of the tests is an alarm at that level.
    """

    id: str
    test: str
    difference: float
    p: float
    reference_mean: float | None = None
    new_mean: float | None = None


def differences(reference: Rows, new: Rows, *, seed: int = 0) -> list[Finding]:
    """Every test of mu (N, D) and, of a generative model, its scores (N,), `elbo` among them.

    Kolmogorov-Smirnov on each latent dimension and score, together one test by Holm's correction; the MMD of
    the latents; the change of the mean ELBO. p-values are then times the number of these (Bonferroni).
    """
    tests = marginals(reference, new)
    distance, p = mmd(reference["mu"], new["mu"], seed=seed)
    tests.append(Finding("mmd", "mmd", distance, p))
    if "elbo" in reference:
        change, p = change_of_mean(reference["elbo"], new["elbo"])
        sides = float(reference["elbo"].mean()), float(new["elbo"].mean())
        tests.append(Finding("mean elbo", "mean", change, p, *sides))
    count = len({test.test for test in tests})
    return [replace(test, p=min(1.0, count * test.p)) for test in tests]


def marginals(reference: Rows, new: Rows) -> list[Finding]:
    """Kolmogorov-Smirnov on each dimension of mu and on each other column, p corrected by Holm."""
    a, b = (
        np.column_stack([rows[name] for name in reference]).astype(np.float64) for rows in (reference, new)
    )
    dimensions = [f"mu[{d}]" for d in range(reference["mu"].shape[1])]
    names = [n for name in reference for n in (dimensions if name == "mu" else [name])]
    distances, p = kolmogorov_smirnov(a, b)
    columns = zip(
        names, distances.tolist(), holm(p).tolist(), a.mean(0).tolist(), b.mean(0).tolist(), strict=True
    )
    return [Finding(f"marginal {name}", "marginal", *rest) for name, *rest in columns]


def verdict(tests: list[Finding], level: float) -> tuple[bool, str]:
    """Whether there is drift, and why in one line."""
    alarms = sorted((test for test in tests if test.p < level), key=lambda test: test.p)
    if not alarms:
        return False, f"none of {len(tests)} tests has a corrected p-value below {level:g}"
    named = ", ".join(f"{test.id} (p {test.p:.2g})" for test in alarms[:3])
    change = next((f"; ELBO {test.difference:+.2f} nats" for test in tests if test.test == "mean"), "")
    return True, f"{len(alarms)} of {len(tests)} tests differ: {named}{change}"


def smallest(tests: list[Finding]) -> dict[str, float]:
    """The smallest corrected p-value of each kind of test."""
    kinds = {test.test for test in tests}
    return {kind: min(test.p for test in tests if test.test == kind) for kind in sorted(kinds)}


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest distance of two distribution functions, and its p-value, each column on its own.

    a (N, D), b (M, D) -> two (D,).

    >>> rows = np.arange(40.0)[:, None]
    >>> distance, p = kolmogorov_smirnov(rows, rows + 10)
    >>> distance.tolist(), bool(p[0] < 0.2)
    ([0.25], True)
    """
    from scipy.stats import ks_2samp

    found = ks_2samp(a, b, axis=0)
    return np.asarray(found.statistic), np.asarray(found.pvalue)


def mmd(
    a: np.ndarray, b: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, float]:
    """The maximum mean discrepancy of a (N, D) and b (M, D), and its p-value by permutation.

    Gretton et al. 2012, *A Kernel Two-Sample Test*: the distance of the two mean embeddings under a Gaussian
    kernel, its bandwidth the median distance of all rows. With w = 1/N on the rows of a and -1/M on those of
    b, its square is w'Kw, so that P permutations of w are one matrix product. The p-value is exact:
    (1 + permutations as large) / (1 + P). Memory is 4 (N + M)^2 bytes.

    >>> draws = np.random.default_rng(0).normal(size=(60, 2))
    >>> mmd(draws[:30], draws[30:] + 2)[1]
    0.001
    """
    rows = np.concatenate([a, b]).astype(np.float32)
    rows -= rows.mean(0)  # distances stay; their float32 gets its digits back
    kernel = squared_distances(rows)
    np.exp(kernel / (-2 * np.median(kernel)), out=kernel)
    weights = np.repeat([1 / len(a), -1 / len(b)], [len(a), len(b)]).astype(np.float32)
    shuffled = np.repeat(weights[:, None], permutations + 1, 1)  # the first column as it is
    np.random.default_rng(seed).permuted(shuffled[:, 1:], axis=0, out=shuffled[:, 1:])
    squares = ((kernel @ shuffled) * shuffled).sum(0, dtype=np.float64)
    return math.sqrt(max(squares[0], 0.0)), float((squares >= squares[0]).mean())


def squared_distances(rows: np.ndarray) -> np.ndarray:
    """(N, D) -> (N, N), of every row to every other.

    >>> squared_distances(np.array([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 25.0], [25.0, 0.0]]
    """
    lengths = (rows * rows).sum(1)
    return np.maximum(lengths[:, None] + lengths - 2 * (rows @ rows.T), 0)


def change_of_mean(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """mean(b) - mean(a), of (N,) and (M,), and the p-value of no change, by Welch's t-test.

    >>> change_of_mean(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0]))[0]
    1.0
    """
    from scipy.stats import ttest_ind

    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(b.mean() - a.mean()), float(ttest_ind(a, b, equal_var=False).pvalue)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values adjusted so that, of those below a level, one or more is wrong no more often than the level.

    Holm 1979: step down from the smallest, p times the number of those left; the smallest is Bonferroni's.

    >>> holm(np.array([0.01, 0.04, 0.03])).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p)
    left = np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * left), 1.0)
    return adjusted
