"""Paired statistics from scipy, statsmodels and numpy: what `podium compare` prints.

    python make_compare_stats.py [--out FOLDER]

Where a library has the figure it is taken from there. Tango's interval is in neither: here the score statistic is
maximized and inverted by halving in 50 digits, from the likelihood itself, not from a closed form. The detectable difference is
solved with brentq from the formula. Bootstrap and permutation use numpy's generator with many replicates; podium's are
held to them within Monte-Carlo error, the standard errors of which are stated in the file.
"""

import argparse
import json
import math
import pathlib

import numpy as np
import statsmodels.api as sm
from mpmath import mp, mpf
from scipy import stats
from scipy.optimize import brentq
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower

SEED = 20261
N_REPLICATES = 200_000
TABLES = [(0, 0, 5), (0, 1, 10), (1, 0, 10), (3, 7, 300), (7, 3, 30), (0, 6, 30), (5, 5, 10), (10, 0, 10),
          (0, 10, 10), (12, 30, 198), (20, 20, 1000), (1, 25, 448), (100, 140, 1319), (400, 520, 2000), (0, 0, 2000), (2500, 2300, 20000)]
P_VALUES = [[0.01], [0.04, 0.01], [0.01, 0.04, 0.03], [0.5, 0.9, 0.02, 0.02], [0.001, 0.2, 0.05, 0.0004, 1.0]]


def halved(f, low, high):
    """Where a falling function crosses 0, to 45 digits."""
    for _ in range(150):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return (low + high) / 2


def score(gained, lost, n, delta):
    """The score statistic at `delta`. The likeliest share of lost pairs is where the likelihood's slope is 0."""
    low, high = max(mpf(0), -delta), (1 - delta) / 2
    def slope(q):
        terms = ((gained, q + delta, 1), (lost, q, 1), (n - gained - lost, 1 - 2 * q - delta, -2))
        return sum(sign * k / p for k, p, sign in terms if k)
    q = halved(slope, low, high)
    distance, variance = gained - lost - n * delta, n * (2 * q + delta * (1 - delta))
    return distance / mp.sqrt(variance) if variance > 0 else mp.sign(distance) * mp.inf


def tango(gained, lost, n):
    z, observed = mpf(float(stats.norm.ppf(0.975))), mpf(gained - lost) / n
    return (float(halved(lambda d: score(gained, lost, n, d) - z, mpf(-1), observed)),
            float(halved(lambda d: score(gained, lost, n, d) + z, observed, mpf(1))))


def detectable(discordance, n):
    za, zb = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    def short(d):
        share = max(discordance, d)
        return math.sqrt(n) * d - za * math.sqrt(share) - zb * math.sqrt(max(share - d * d, 0))
    return None if short(1.0) < 0 else brentq(short, 1e-12, 1.0, xtol=1e-15)


def resampled(values, rng):
    values = np.array(values)
    n = len(values)
    means = np.array([values[rng.integers(0, n, n)].mean() for _ in range(N_REPLICATES)])
    low, high = np.quantile(means, [0.025, 0.975])
    flips = rng.integers(0, 2, (N_REPLICATES, n)) * 2 - 1
    sums = np.abs(flips @ values)
    p = (np.count_nonzero(sums >= abs(values.sum()) - 1e-9) + 1) / (N_REPLICATES + 1)
    # Of a quantile, by the density between the means' quantiles beside it.
    def density(share):
        a, b = np.quantile(means, [share - 0.01, share + 0.01])
        return 0.02 / (b - a)
    errors = [math.sqrt(0.025 * 0.975) / density(s) for s in (0.025, 0.975)]
    return {"values": values.tolist(), "low": float(low), "high": float(high), "permutation_p": float(p),
            "low_error_of_one": errors[0], "high_error_of_one": errors[1], "n_replicates": N_REPLICATES}


def clustered(rng, n_clusters, size):
    clusters = np.repeat(np.arange(n_clusters), size)
    shift = rng.normal(0, 0.3, n_clusters)[clusters]
    values = np.clip(np.round(shift + rng.normal(-0.05, 0.5, len(clusters))), -1, 1)
    fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    low, high = fit.conf_int()[0]
    return {"values": values.tolist(), "clusters": [f"c{c}" for c in clusters], "mean": float(fit.params[0]),
            "standard_error": float(fit.bse[0]), "low": float(low), "high": float(high), "p": float(fit.pvalues[0])}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    folder = parser.parse_args().out / "stats"
    folder.mkdir(parents=True, exist_ok=True)
    mp.dps = 50
    rng = np.random.default_rng(SEED)
    tables = []
    for lost, gained, n in TABLES:
        exact = mcnemar([[0, lost], [gained, 0]], exact=True).pvalue if lost + gained else 1.0
        smaller, changed = min(lost, gained), lost + gained
        assert math.isclose(exact, stats.binomtest(smaller, changed, 0.5).pvalue if changed else 1.0, rel_tol=1e-12)
        mid = 2 * stats.binom.cdf(smaller, changed, 0.5) - stats.binom.pmf(smaller, changed, 0.5)
        low, high = tango(gained, lost, n)
        tables.append({"lost": lost, "gained": gained, "n": n, "exact_p": float(exact), "mid_p": float(min(mid, 1.0)),
                       "low": low, "high": high, "detectable": detectable((lost + gained) / n, n)})
    means = []
    for deviation, n in ((0.3, 40), (0.11, 1319)):
        found = float(deviation * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / math.sqrt(n))
        # statsmodels searches for it, to seven digits.
        searched = NormalIndPower().solve_power(None, nobs1=n, alpha=0.025, power=0.8, ratio=0, alternative="larger")
        assert math.isclose(found, searched * deviation, rel_tol=1e-6)
        means.append({"deviation": deviation, "n": n, "detectable": found})
    shares = [rng.choice([-0.75, -0.5, -0.25, 0, 0, 0, 0.25, 0.5], 60), rng.choice([-0.25, 0, 0, 0.25], 25),
              rng.choice([-0.5, -0.25, 0, 0.25], 200)]
    document = {
        "tables": tables,
        "means": means,
        "holm": [{"p": p, "adjusted": multipletests(p, method="holm")[1].tolist()} for p in P_VALUES],
        "normal": [{"z": z, "p": float(2 * stats.norm.sf(z))} for z in (0, 0.1, 1, 1.96, 3, 3.5, 3.6, 5, 8, 20)],
        "resampled": [resampled(v, rng) for v in shares],
        "clustered": [clustered(rng, 20, 5), clustered(rng, 64, 7)],
    }
    (folder / "compare.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
