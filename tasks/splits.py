"""Which problems are the same, which are so alike that they belong on one side, and which split each of them goes to."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ..basics import fold_seed

_SKETCH = 12  # smallest shingle hashes that are looked up: texts that share half of all miss each other once in 4,000


def same_text(prompt: str) -> str:
    """The key that is equal for prompts that differ in case, in the width of white space or in blanks before punctuation."""
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return re.sub(r" (?=[.,;:?!'’])", "", text)


def draw_split(key: str, shares: Mapping[str, float]) -> str:
    """The split that a hash of `key` falls into; the same for every machine, seed and order of the data."""
    point, passed = fold_seed(0, "split", key) / 2**63, 0.0
    for name, share in shares.items():
        passed += share
        if point < passed:
            return name
    return list(shares)[-1]


def alike_groups(keys: Sequence[str], threshold: float) -> list[str]:
    """For each key the smallest key of its group, where keys that share `threshold` of their word triples are in one group.

    Sharing is |A and B| / |A or B| over sets of three words in a row, and groups are what is connected by it. A threshold of
    0 puts every key in a group of its own. Candidates are looked up by their smallest hashes: time grows with the number of keys
    and of alike pairs, not with all pairs.
    """
    if not threshold:
        return list(keys)
    shingles = [_shingles(key) for key in keys]
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[int, list[int]] = defaultdict(list)
    for i, mine in enumerate(shingles):
        compared: set[int] = set()
        for value in sorted(mine)[:_SKETCH]:
            for j in seen[value]:
                if j in compared:
                    continue
                compared.add(j)
                a, b = root(i), root(j)
                if a != b and len(mine & shingles[j]) >= threshold * len(mine | shingles[j]):
                    parent[max(a, b)] = min(a, b)
            # A triple that very many texts open with says little, and comparing all of them would be quadratic.
            if len(seen[value]) < 200:
                seen[value].append(i)
    smallest: dict[int, str] = {}
    for i, key in enumerate(keys):
        r = root(i)
        smallest[r] = min(smallest.get(r, key), key)
    return [smallest[root(i)] for i in range(len(keys))]


def _shingles(key: str) -> set[int]:
    words = re.findall(r"\w+", key) or [key]
    return {zlib.crc32(" ".join(words[i : i + 3]).encode()) for i in range(max(len(words) - 2, 1))}
