"""Wilson 95 % intervals from statsmodels.

    python make_stats.py [--out FOLDER]
"""

import argparse
import json
import pathlib

from statsmodels.stats.proportion import proportion_confint

PAIRS = [(0, 1), (1, 1), (0, 2), (1, 2), (2, 2), (0, 10), (1, 10), (5, 10), (9, 10), (10, 10), (3, 7), (17, 23),
         (50, 100), (1, 100), (99, 100), (100, 100), (0, 100), (137, 198), (664, 1319), (1319, 1319), (1, 1319),
         (5000, 10000), (123456, 1000000), (999999, 1000000)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    folder = parser.parse_args().out / "stats"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "wilson.json", "w") as file:
        rows = []
        for k, n in PAIRS:
            low, high = proportion_confint(k, n, alpha=0.05, method="wilson")
            rows.append(json.dumps({"k": k, "n": n, "low": float(low), "high": float(high)}))
        file.write("[\n  " + ",\n  ".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()
