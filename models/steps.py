"""Where steps end in sampled token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def cut_steps(tokenizer: Any, ids: Sequence[int], separator: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(step texts, step ends): ends[t] counts the ids up to and including the separator of step t.

    A step ends at the token whose text completes `separator`; white space behind it (blank lines) still belongs to it. Special
    tokens, such as the end of the sequence, belong to no step. A last step without a separator ends where the text ends.
    Step texts hold no separator: a step format appends its ids again.
    """
    special = set(tokenizer.all_special_ids)
    ids = list(ids)
    while ids and ids[-1] in special:
        ids.pop()
    pieces = tokenizer.batch_decode([[i] for i in ids])
    steps: list[str] = []
    ends: list[int] = []
    begin, text = 0, ""
    for position, piece in enumerate(pieces):
        text += piece
        if separator in text or (separator.strip() == "" and not text.strip() and separator in piece):
            step = tokenizer.decode(ids[begin : position + 1], skip_special_tokens=True).strip()
            step = step.removesuffix(separator.strip()).strip()
            if step:
                steps.append(step)
                ends.append(position + 1)
            elif ends:
                ends[-1] = position + 1
            begin, text = position + 1, ""
    rest = tokenizer.decode(ids[begin:], skip_special_tokens=True).strip() if begin < len(ids) else ""
    if rest:
        steps.append(rest)
        ends.append(len(ids))
    elif ends:
        ends[-1] = len(ids)
    return tuple(steps), tuple(ends)
