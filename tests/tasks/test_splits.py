"""Equal and alike problems stay together, and splits depend on nothing but the text."""

import random
from collections import Counter

from stepladder.tasks.splits import alike_groups, draw_split, same_text


def test_same_text_forgives_layout_and_nothing_else():
    assert same_text("Sara 's  school\nhas 3 .") == same_text("Sara's school has 3.")
    assert same_text("3 + 4") != same_text("3 - 4")
    assert same_text("1 2") != same_text("12")


def test_splits_have_their_shares_and_never_move():
    shares = {"train": 0.7, "dev": 0.1, "test": 0.2}
    counts = Counter(draw_split(f"problem {i}", shares) for i in range(20_000))
    assert all(abs(counts[name] / 20_000 - share) < 0.01 for name, share in shares.items())
    # Written down once: a change of these would move problems between training and evaluation of old runs.
    assert [draw_split(f"problem {i}", shares) for i in range(10)] == [
        "test",
        "train",
        "train",
        "train",
        "test",
        "test",
        "train",
        "train",
        "train",
        "dev",
    ]


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10_000)}" for _ in range(count)]


def test_alike_texts_are_one_group_and_others_are_not():
    rng = random.Random(0)
    first, second = words(rng, 30), words(rng, 30)
    near = first.copy()
    near[15] = "changed"  # 3 of 28 triples differ on each side: 25 / 31 are shared
    half = first[:18] + words(rng, 12)  # 16 triples of 28 are shared: 16 / 40
    keys = [" ".join(w) for w in (first, second, near, half)]
    groups = alike_groups(keys, 0.5)
    assert groups[0] == groups[2]
    assert len(set(groups)) == 3
    assert len(set(alike_groups(keys, 0.3))) == 2
    assert alike_groups(keys, 0) == keys


def test_groups_equal_those_of_comparing_every_pair():
    rng = random.Random(1)
    bases = [words(rng, 25) for _ in range(40)]
    texts = []
    for base in bases:
        for _ in range(4):
            changed = base.copy()
            for _ in range(rng.randrange(5)):
                changed[rng.randrange(25)] = f"x{rng.randrange(10_000)}"
            texts.append(" ".join(changed))
    keys = list(dict.fromkeys(texts))

    def triples(key):
        w = key.split()
        return {tuple(w[i : i + 3]) for i in range(len(w) - 2)}

    group = {key: {key} for key in keys}
    for a in keys:
        for b in keys:
            if len(triples(a) & triples(b)) >= 0.5 * len(triples(a) | triples(b)):
                union = group[a] | group[b]
                for key in union:
                    group[key] = union
    assert alike_groups(keys, 0.5) == [min(group[key]) for key in keys]
    shuffled = keys.copy()
    rng.shuffle(shuffled)
    again = dict(zip(shuffled, alike_groups(shuffled, 0.5), strict=True))
    assert [again[key] for key in keys] == alike_groups(keys, 0.5), "the order of the data does not matter"


def test_very_short_and_empty_texts_are_no_trouble():
    assert alike_groups(["", "a", "a b", "+", "-"], 0.5) == ["", "a", "a b", "+", "-"]
