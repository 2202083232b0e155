"""The report's chains of attempts and critiques, to browse without a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import page


def corrections_section(chains: Sequence[Mapping[str, Any]]) -> str:
    """Chains by source, each folded under its problem and the verdicts on its attempts.

    A chain is {source, problem_id, prompt, attempts [{text, right, answer}], said [{text, wrong} or null]}.
    """
    parts: list[str] = []
    for source in dict.fromkeys(chain["source"] for chain in chains):
        parts.append(f"<h3>{page.text(source)}</h3>")
        for chain in chains:
            if chain["source"] == source:
                parts.append(_chain(chain))
    return "".join(parts)


def _chain(chain: Mapping[str, Any]) -> str:
    verdicts = " → ".join("✓ right" if attempt["right"] else "✗ wrong" for attempt in chain["attempts"])
    body = [f"<pre>{page.text(chain['prompt'])}</pre>"] if chain["prompt"] else []
    for number, (attempt, said) in enumerate(zip(chain["attempts"], chain["said"], strict=True), 1):
        verdict = "✓ right" if attempt["right"] else "✗ wrong"
        body.append(f"<p>Attempt {number}: {verdict}</p><pre>{page.text(attempt['text'])}</pre>")
        if said is not None:
            says = {True: "wrong", False: "right", None: "nothing that can be read"}[said["wrong"]]
            body.append(f"<p>The critic says: {says}</p><pre>{page.text(said['text'])}</pre>")
    return f"<details><summary>{page.text(chain['problem_id'])}: {verdicts}</summary>{''.join(body)}</details>"
