#!/usr/bin/env python3
"""Writes rows.jsonl: 60 questions in the shape of CURE-Bench's, 20 of each type.

    make.py > rows.jsonl

Drugs, doses and effects are invented; nothing here is medical advice or anybody's data set. Ids and
texts carry what breaks submissions: quotes, line ends, commas, leading zeros, words that pandas reads
as missing, a cell that a spreadsheet takes for a formula.
"""

import json
import random
import sys

DRUGS = "Ivolin Tresamab Quorexin Palidone Zevarine Lumetrol Oxaflin Bredanol Cavitrex Nuvimide".split()
SIGNS = ["a dry cough", "night sweats", "a slow pulse", "joint pain", "blurred sight", "hiccups"]
ODD = ["", ' He says "it burns".', "\nNo other drugs.", " =1+1 is on the label.", " Naïve to β-blockers; 5 µg.", " N/A"]
KINDS = ["multi_choice", "open_ended_multi_choice", "open_ended"]
ODD_IDS = {3: "007", 11: 'q "eleven"', 17: "a,b", 23: "two\nlines", 31: "-nan-1", 44: "=SUM(A1)", 52: "größe"}


def main() -> None:
    draw = random.Random(5)
    for index in range(60):
        kind = KINDS[index % 3]
        drug, other = draw.sample(DRUGS, 2)
        sign = draw.choice(SIGNS)
        dose = draw.choice([2, 5, 10, 25])
        row = {
            "id": ODD_IDS.get(index, f"q{index:03d}"),
            "question_type": kind,
            "question": f"A patient on {drug} {dose} mg has {sign}.{draw.choice(ODD)} What now?",
        }
        answers = [f"Stop {drug}", f"Halve {drug} to {dose / 2:g} mg", f"Add {other}", "None", "Wait, then test again"]
        if kind == "open_ended":
            row["answer"] = answers[index % 5] if answers[index % 5] != "None" else "Nothing"
        else:
            shown = answers[: 4 + index % 2]
            draw.shuffle(shown)
            row["options"] = dict(zip("ABCDE", shown))
            row["answer"] = "ABCD"[index % 4]
        json.dump(row, sys.stdout, ensure_ascii=False)
        print()


if __name__ == "__main__":
    main()
