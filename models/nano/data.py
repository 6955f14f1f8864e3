#!/usr/bin/env python3
"""Questions for nano: seven procedural families, the train/test split, and the prompt text.

Plain Python, no packages. The split is a property of the question alone: the SHA-256 of the full
user text decides on which side it falls, so neither a seed nor a file says what the model has seen.

    python3 models/nano/data.py --write    write datasets/nano
    python3 models/nano/data.py --check    every row there is a test question, no training draw is
    python3 models/nano/data.py --show     print an example of each family and effort
"""

import argparse
import csv
import hashlib
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

DATASETS = Path(__file__).resolve().parents[2] / "datasets" / "nano"
DATASET_SEED = 20
ROWS_PER_FAMILY = 300
ROWS_MIXED = 500
CHECK_DRAWS = 200_000

EFFORTS = ("low", "medium", "high")
LETTERS = "ABCD"

SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\n\n"
    "Reasoning: {effort}\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
DEVELOPER = "# Instructions\n\nThink briefly, then give only the answer."


@dataclass
class Item:
    """One question with its gold answer and an analysis for each effort."""

    family: str
    question: str
    answer: str
    analysis: dict
    options: list | None = None

    def user_text(self) -> str:
        return user_text(self.question, self.options)


def user_text(question: str, options: list | None) -> str:
    """The user message: the question, and one line for each option."""
    lines = [question] + [f"{l}. {o}" for l, o in zip(LETTERS, options or [])]
    return "\n".join(lines)


def render_prefix(effort: str) -> str:
    """Everything before the user's text; the same for all questions of one effort."""
    return (
        f"<|start|>system<|message|>{SYSTEM.format(effort=effort)}<|end|>"
        f"<|start|>developer<|message|>{DEVELOPER}<|end|><|start|>user<|message|>"
    )


def render_prompt(text: str, effort: str) -> str:
    return f"{render_prefix(effort)}{text}<|end|><|start|>assistant"


def render_completion(analysis: str, answer: str) -> str:
    return (
        f"<|channel|>analysis<|message|>{analysis}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{answer}<|return|>"
    )


def is_test(text: str) -> bool:
    """A question belongs to the test side iff the first byte of its digest is below 26 (10.2 %)."""
    return hashlib.sha256(text.encode("utf-8")).digest()[0] < 26


# --- families -------------------------------------------------------------------------------------


def column_add(a: int, b: int) -> str:
    """Digit by digit from the right, with carries: `347+586` -> `7+6=13 4+8+1=13 3+5+1=9`."""
    steps, carry = [], 0
    while a or b:
        total = a % 10 + b % 10 + carry
        steps.append(f"{a % 10}+{b % 10}{'+1' if carry else ''}={total}")
        a, b, carry = a // 10, b // 10, total // 10
    return " ".join(steps)


def column_sub(a: int, b: int) -> str:
    """Digit by digit from the right; a negative column borrows ten: `3-9+10=4`."""
    steps, borrow = [], 0
    while a or b:
        d = a % 10 - b % 10 - borrow
        steps.append(f"{a % 10}-{b % 10}{'-1' if borrow else ''}{'+10' if d < 0 else ''}={d % 10}")
        a, b, borrow = a // 10, b // 10, int(d < 0)
    return " ".join(steps)


def sums(rng: random.Random) -> Item:
    total = rng.randint(10, 999)
    text, short, long = str(total), [], []
    for _ in range(rng.randint(1, 3)):
        term = rng.randint(2, 999)
        minus = term <= total and rng.random() < 0.5
        after = total - term if minus else total + term
        sign, columns = ("-", column_sub) if minus else ("+", column_add)
        short.append(f"{total}{sign}{term}={after}")
        long.append(f"{total}{sign}{term}: {columns(total, term)}, {after}")
        text += f" {sign} {term}"
        total = after
    return Item(
        "sums",
        f"What is {text}?",
        str(total),
        {"low": "Add up.", "medium": ", ".join(short), "high": ". ".join(long)},
    )


def parts(n: int) -> list[int]:
    """The place values of n without zeros: 506 -> [500, 6]."""
    s = str(n)
    return [int(d) * 10 ** (len(s) - 1 - i) for i, d in enumerate(s) if d != "0"]


def running(terms: list[int]) -> str:
    """`240+42=282`, term after term; nothing for a single term."""
    steps, total = [], terms[0]
    for t in terms[1:]:
        steps.append(f"{total}+{t}={total + t}")
        total += t
    return ", ".join(steps)


def product_steps(a: int, b: int, spelled: bool) -> str:
    """Partial products over b's digits, then their sum; `spelled` splits each partial over a."""
    partials, lines = [], []
    for q in parts(b):
        partials.append(a * q)
        split = parts(a)
        if spelled and len(split) > 1:
            lines.append(f"{a}*{q}={'+'.join(str(p * q) for p in split)}={a * q}")
        else:
            lines.append(f"{a}*{q}={a * q}")
    if len(partials) > 1:
        lines.append(running(partials))
    return ", ".join(lines)


def products(rng: random.Random) -> Item:
    if rng.random() < 0.3:
        a, b = rng.randint(101, 999), rng.randint(2, 9)
    else:
        a, b = rng.randint(11, 99), rng.randint(11, 99)
    return Item(
        "products",
        f"What is {a} times {b}?",
        str(a * b),
        {"low": "Multiply.", "medium": product_steps(a, b, False), "high": product_steps(a, b, True)},
    )


def long_products(rng: random.Random, digits: tuple = (3, 4, 5)) -> Item:
    """The hard one: up to five digits each, and at medium effort all partial products in one sum.

    Test questions take the longer factors; training needs the short ones on the way there.
    """
    a, b = (rng.randint(10 ** (n - 1) + 1, 10**n - 1) for n in rng.choices(digits, k=2))
    partials = [a * q for q in parts(b)]
    medium = "+".join(map(str, partials)) + f"={a * b}"
    return Item(
        "long_products",
        f"What is the product of {a} and {b}?",
        str(a * b),
        {"low": "Multiply.", "medium": medium, "high": running(partials) or medium},
    )


def long_division(a: int, b: int) -> str:
    """Schoolbook division, a line a digit: `34=2*12+10 107=8*12+11`."""
    steps, rest = [], 0
    for d in str(a):
        rest = rest * 10 + int(d)
        if rest >= b:
            steps.append(f"{rest}={rest // b}*{b}+{rest % b}")
            rest %= b
    return " ".join(steps) or f"{a}=0*{b}+{a}"


def gcd_or_remainder(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        a, b = rng.randint(50, 999), rng.randint(3, 60)
        q, r = divmod(a, b)
        medium = long_division(a, b)
        return Item(
            "gcd_or_remainder",
            f"What is the remainder when {a} is divided by {b}?",
            str(r),
            {"low": "Divide.", "medium": medium, "high": f"{medium}, so {q}*{b}={q * b}, {a}-{q * b}={r}"},
        )
    while True:
        g = rng.randint(1, 40)
        a, b = g * rng.randint(2, 24), g * rng.randint(2, 24)
        steps, x, y = [], max(a, b), min(a, b)
        while y:
            steps.append((x, y))
            x, y = y, x % y
        if a != b and len(steps) <= 5:
            break
    medium = ", ".join(f"{x}={x // y}*{y}+{x % y}" for x, y in steps)
    high = ", ".join(f"{x // y}*{y}={x // y * y} {x}-{x // y * y}={x % y}" for x, y in steps)
    return Item(
        "gcd_or_remainder",
        f"What is the greatest common divisor of {a} and {b}?",
        str(x),
        {"low": "Divide.", "medium": medium, "high": high},
    )


ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def made_up_word(rng: random.Random, n: int) -> str:
    """Letters that alternate between consonants and vowels, with some doubled consonants."""
    word = ""
    while len(word) < n:
        word += rng.choice("bcdfghjklmnpqrstvwxyz") + rng.choice("aeiou")
        if rng.random() < 0.3:
            word += rng.choice("lmnrst")
    return word[:n]


def count_letters(rng: random.Random) -> Item:
    n = rng.randint(0, 7)
    letter = rng.choice(ALPHABET)
    others = ALPHABET.replace(letter, "")
    word = [letter] * n + [rng.choice(others) for _ in range(rng.randint(max(2, 6 - n), 14 - n))]
    rng.shuffle(word)
    word = "".join(word)
    short, long, seen = [], [], 0
    for c in word:
        seen += c == letter
        short.append(f" {c}{seen}" if c == letter else f" {c}")
        long.append(f" {c}{seen}")
    return Item(
        "count_letters",
        f'How many times does the letter "{letter}" occur in "{word}"?',
        str(n),
        {
            "low": "Count.",
            "medium": f"Spell{''.join(short)}, so {n}",
            "high": f"Spell{''.join(long)}, so {n}",
        },
    )


def sort_or_reverse(rng: random.Random) -> Item:
    kind = rng.randrange(3)
    if kind == 0:
        word = made_up_word(rng, rng.randint(4, 10))
        back = word[::-1]
        spell = lambda w: "".join(f" {c}" for c in w)
        question, answer = f'Write the word "{word}" backwards.', back
        medium = f"Spell{spell(word)}, back{spell(back)}"
        high = medium
    elif kind == 1:
        values = [rng.randint(1, 99) for _ in range(rng.randint(4, 7))]
        question = f"Write the list in reverse order: {', '.join(map(str, values))}"
        answer = ", ".join(map(str, values[::-1]))
        medium = high = f"Last is {values[-1]}, first is {values[0]}"
    else:
        values = rng.sample(range(1, 1000), rng.randint(4, 6))
        down = rng.random() < 0.5
        ordered = sorted(values, reverse=down)
        answer = ", ".join(map(str, ordered))
        word = "descending" if down else "ascending"
        question = f"Sort the numbers in {word} order: {', '.join(map(str, values))}"
        medium = f"First is {ordered[0]}, last is {ordered[-1]}"
        left, picks = list(values), []
        for v in ordered[:-2]:
            picks.append(f"{v} of {' '.join(map(str, left))}")
            left.remove(v)
        high = ", ".join(picks)
    return Item(
        "sort_or_reverse", question, answer, {"low": "Order.", "medium": medium, "high": high}
    )


def expression(rng: random.Random, value: int) -> str:
    """A sum, difference or product with the given value."""
    kind = rng.randrange(3)
    if kind == 0:
        divisors = [d for d in range(2, 13) if value % d == 0 and 1 < value // d <= 20]
        if divisors:
            d = rng.choice(divisors)
            return f"{d} * {value // d}"
    if kind == 1:
        x = rng.randint(1, 60)
        return f"{value + x} - {x}"
    x = rng.randint(1, value - 1)
    return f"{x} + {value - x}"


def choice(rng: random.Random) -> Item:
    kind = rng.randrange(3)
    at = rng.randrange(4)
    if kind == 0:
        large = rng.random() < 0.5
        base = rng.randint(100, 9000)
        values = rng.sample(range(base, base + rng.choice((60, 400, 900))), 4)
        best = max(values) if large else min(values)
        here = values.index(best)
        values[here], values[at] = values[at], values[here]
        question = f"Which number is the {'largest' if large else 'smallest'}?"
        options = list(map(str, values))
        medium = f"{'Largest' if large else 'Smallest'} is {best}"
        high = f"{' '.join(map(str, sorted(values, reverse=large)))}, so {best}"
    elif kind == 1:
        value = rng.randint(12, 99)
        wrong = rng.sample([v for v in range(max(8, value - 12), value + 13) if v != value], 3)
        values = wrong[:at] + [value] + wrong[at:]
        options = [expression(rng, v) for v in values]
        question = f"Which expression equals {value}?"
        steps = [f"{o.replace(' ', '')}={v}" for o, v in zip(options, values)]
        medium = ", ".join(steps)
        high = ", ".join(f"{l} {s}" for l, s in zip(LETTERS, steps))
    else:
        k = rng.randint(3, 12)
        values = [k * rng.randint(4, 30) + rng.randint(1, k - 1) for _ in range(4)]
        values[at] = k * rng.randint(4, 30)
        options = list(map(str, values))
        question = f"Which number is divisible by {k}?"
        medium = ", ".join(f"{v}={v // k}*{k}+{v % k}" for v in values)
        high = ", ".join(f"{l} {long_division(v, k)}" for l, v in zip(LETTERS, values))
    if len(set(options)) < 4:
        return choice(rng)
    return Item(
        "choice",
        question,
        LETTERS[at],
        {"low": "Choose.", "medium": f"{medium}: {LETTERS[at]}", "high": f"{high}: {LETTERS[at]}"},
        options,
    )


FAMILIES = {
    f.__name__: f
    for f in (
        sums,
        products,
        gcd_or_remainder,
        count_letters,
        sort_or_reverse,
        choice,
        long_products,
    )
}


# --- drawing --------------------------------------------------------------------------------------

# Share of the training draws. The families with more digits to learn get more.
TRAIN_WEIGHTS = {
    "sums": 3,
    "products": 3,
    "gcd_or_remainder": 4,
    "count_letters": 2,
    "sort_or_reverse": 2,
    "choice": 4,
    "long_products": 4,
}
EFFORT_WEIGHTS = {"low": 3, "medium": 4, "high": 3}


def draw_train(rng: random.Random) -> Item:
    """A training question; one that belongs to the test side is drawn again."""
    family = rng.choices(list(TRAIN_WEIGHTS), list(TRAIN_WEIGHTS.values()))[0]
    while True:
        item = FAMILIES[family](rng)
        if not is_test(item.user_text()):
            return item


def draw_effort(rng: random.Random) -> str:
    return rng.choices(list(EFFORT_WEIGHTS), list(EFFORT_WEIGHTS.values()))[0]


TEST_DIFFICULTY = {"long_products": {"digits": (4, 5, 5)}}


def draw_test(rng: random.Random, family: str, n: int, seen: set) -> list[Item]:
    """n test questions of one family, none of them in `seen`, which grows by them."""
    items = []
    while len(items) < n:
        item = FAMILIES[family](rng, **TEST_DIFFICULTY.get(family, {}))
        text = item.user_text()
        if is_test(text) and text not in seen:
            seen.add(text)
            items.append(item)
    return items


def to_row(row_id: str, item: Item) -> dict:
    row = {"id": row_id, "question": item.question}
    if item.options:
        row["options"] = item.options
    return row | {"answer": item.answer, "group": item.family}


def test_rows() -> dict[str, list[dict]]:
    """The rows of every file in datasets/nano, by file stem."""
    rng, seen, files = random.Random(DATASET_SEED), set(), {}
    for family in FAMILIES:
        items = draw_test(rng, family, ROWS_PER_FAMILY, seen)
        files[family] = [to_row(f"{family}-{i:04}", it) for i, it in enumerate(items, 1)]
    mixed = []
    for i in range(ROWS_MIXED):
        mixed += draw_test(rng, list(FAMILIES)[i % len(FAMILIES)], 1, seen)
    rng.shuffle(mixed)
    files["mixed"] = [to_row(f"mixed-{i:04}", it) for i, it in enumerate(mixed, 1)]
    return files


def held_out(n: int, seed: int = 77) -> list[Item]:
    """n questions a family from the test side for use while training; none stands in datasets/nano."""
    seen = {
        user_text(r["question"], r.get("options")) for rows in test_rows().values() for r in rows
    }
    rng = random.Random(seed)
    return [it for family in FAMILIES for it in draw_test(rng, family, n, seen)]


# --- commands -------------------------------------------------------------------------------------


def write() -> None:
    DATASETS.mkdir(parents=True, exist_ok=True)
    for stem, rows in test_rows().items():
        with open(DATASETS / f"{stem}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        if stem == "sums":
            with open(DATASETS / "sums.csv", "w", encoding="utf-8", newline="") as f:
                out = csv.DictWriter(f, ["id", "question", "answer", "group"], lineterminator="\n")
                out.writeheader()
                out.writerows(rows)


def check() -> int:
    """Print what breaks the split; the number of faults."""
    faults, n_rows = 0, 0
    for path in sorted(DATASETS.glob("*.*")):
        with open(path, encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f)) if path.suffix == ".csv" else [json.loads(x) for x in f]
        for row in rows:
            n_rows += 1
            if not is_test(user_text(row["question"], row.get("options"))):
                faults += 1
                print(f"{path.name}: {row['id']} is not a test question")
        top = Counter(r["answer"] for r in rows).most_common(1)[0]
        print(f"{path.name}: {len(rows)} rows, majority answer {top[0]!r} {top[1] / len(rows):.1%}")
    if n_rows == 0:
        faults += 1
        print(f"no rows in {DATASETS}")
    rng = random.Random("check")
    leaked = sum(is_test(draw_train(rng).user_text()) for _ in range(CHECK_DRAWS))
    print(f"{n_rows} rows checked; {leaked} test questions in {CHECK_DRAWS} training draws")
    return faults + leaked


def show() -> None:
    rng = random.Random(1)
    for family, make in FAMILIES.items():
        for _ in range(3):
            item = make(rng)
            print(f"[{family}] {item.user_text()!r} -> {item.answer!r}")
            for effort in EFFORTS:
                print(f"    {effort}: {item.analysis[effort]}")


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--check", action="store_true", help="verify the split, exit 1 on a fault")
    ap.add_argument("--write", action="store_true", help="write datasets/nano")
    ap.add_argument("--show", action="store_true", help="print examples")
    args = ap.parse_args()
    if args.write:
        write()
    if args.show:
        show()
    return int(args.check and check() > 0)


if __name__ == "__main__":
    sys.exit(main())
