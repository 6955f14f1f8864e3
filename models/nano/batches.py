"""Training batches: worker processes draw conversations, tokenize them and pack them into rows.

Several conversations share a row; `doc` numbers them so that attention stays inside each. The loss
counts completion tokens only.
"""

import multiprocessing as mp
import random
from dataclasses import dataclass

import numpy as np

import data
import tokenizer

PAD_DOC = 255


@dataclass
class Batch:
    ids: np.ndarray  # [n_rows, length] uint16
    doc: np.ndarray  # [n_rows, length] uint8, PAD_DOC behind the last conversation
    target: np.ndarray  # [n_rows, length] int16, the next token where it counts, else -1
    n_tokens: int  # without padding


class Encoder:
    """Renders and tokenizes conversations; the fixed prefix of each effort is encoded once."""

    def __init__(self):
        self.tok = tokenizer.load()
        encode = lambda s: self.tok.encode(s).ids
        self.prefix = {e: encode(data.render_prefix(e)) for e in data.EFFORTS}
        self.end = encode("<|end|>")[0]
        self.stop = {encode(s)[0] for s in ("<|return|>", "<|endoftext|>", "<|call|>")}

    def prompt(self, text: str, effort: str) -> list[int]:
        return self.prefix[effort] + self.tok.encode(f"{text}<|end|><|start|>assistant").ids

    def conversation(self, rng: random.Random) -> tuple[list[int], int]:
        """Token ids and the number of them that belong to the prompt."""
        item, effort = data.draw_train(rng), data.draw_effort(rng)
        completion = data.render_completion(item.analysis[effort], item.answer)
        rest = self.tok.encode(f"{item.user_text()}<|end|><|start|>assistant{completion}").ids
        prefix = self.prefix[effort]
        return prefix + rest, len(prefix) + rest.index(self.end) + 3


def fill_batch(docs: list, draw, n_rows: int, length: int) -> Batch:
    """Pack rows from the pool `docs`: the oldest conversation first, then the longest that fit."""
    ids = np.zeros((n_rows, length), np.uint16)
    doc = np.full((n_rows, length), PAD_DOC, np.uint8)
    target = np.full((n_rows, length), -1, np.int16)
    n_tokens = 0
    for r in range(n_rows):
        while len(docs) < 400:
            docs.append(draw())
        used, number, at = 0, 0, 0
        while at is not None:
            tokens, n_prompt = docs.pop(at)
            n = len(tokens)
            ids[r, used : used + n] = tokens
            doc[r, used : used + n] = number
            target[r, used + n_prompt - 1 : used + n - 1] = tokens[n_prompt:]
            used, number = used + n, number + 1
            fits = [(len(d[0]), -i) for i, d in enumerate(docs) if len(d[0]) <= length - used]
            at = -max(fits)[1] if fits else None
        n_tokens += used
    return Batch(ids, doc, target, n_tokens)


def _work(seed: str, n_rows: int, length: int, queue) -> None:
    encoder, rng, docs = Encoder(), random.Random(seed), []
    while True:
        queue.put(fill_batch(docs, lambda: encoder.conversation(rng), n_rows, length))


def start(seed: int, n_workers: int, n_rows: int, length: int):
    """A queue of batches and the daemon processes that fill it. Call it before CUDA is in use."""
    queue = mp.Queue(maxsize=4 * n_workers)
    workers = [
        mp.Process(target=_work, args=(f"{seed}-{w}", n_rows, length, queue), daemon=True)
        for w in range(n_workers)
    ]
    for w in workers:
        w.start()
    return queue, workers
