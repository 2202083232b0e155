"""The didactic toy of PAV (arXiv:2410.08146 section 3.3, appendix B) in tabular form, with exact values by dynamic programming.

Sequences of 10 tokens out of 15; token 14 ends a sequence early. The reward is 1 if the planted 3 6 0 3 5 occurs somewhere in it.
All that matters of a sequence is how many tokens are left and how long a beginning of the planted sequence stands at its end, so
that a policy is a table over (position, matched length), and values of any policy are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

PLANTED = (3, 6, 0, 3, 5)
LENGTH, TOKENS, END = 10, 15, 14
MATCHED = len(PLANTED)  # the state after the whole planted sequence: success whatever follows

Table = np.ndarray  # [LENGTH, MATCHED, TOKENS]: position, matched length, next token


def next_matched(matched: int, token: int) -> int:
    """How long a beginning of the planted sequence stands at the end after one more token: the longest suffix that is one."""
    written = (*PLANTED[:matched], token)
    return max(k for k in range(len(written) + 1) if written[len(written) - k :] == PLANTED[:k])


_NEXT = np.array([[next_matched(k, token) for token in range(TOKENS)] for k in range(MATCHED)])


def weighted_policy(gamma: float) -> Table:
    """The family of the paper's provers: the next right token has weight `gamma`, every other token weight 1."""
    weights = np.ones((MATCHED, TOKENS))
    weights[np.arange(MATCHED), PLANTED] = gamma
    return np.broadcast_to(weights / weights.sum(1, keepdims=True), (LENGTH, MATCHED, TOKENS)).copy()


def exact_values(policy: Table) -> tuple[np.ndarray, np.ndarray]:
    """(V [LENGTH, MATCHED], Q [LENGTH, MATCHED, TOKENS]): probabilities of success under a policy, from the end backwards."""
    value, quality = np.zeros((LENGTH + 1, MATCHED + 1)), np.zeros((LENGTH, MATCHED, TOKENS))
    value[:, MATCHED] = 1.0
    for t in reversed(range(LENGTH)):
        quality[t] = value[t + 1][_NEXT]
        quality[t, :, END] = 0.0  # nothing behind the end counts
        value[t, :MATCHED] = (policy[t] * quality[t]).sum(1)
    return value[:LENGTH, :MATCHED], quality


def success(policy: Table) -> float:
    """The exact probability that a policy's sequence holds the planted one."""
    return float(exact_values(policy)[0][0, 0])


def exact_advantages(policy: Table, k: int = 1) -> Table:
    """A [LENGTH, MATCHED, TOKENS] of a prover: the best of `k` attempts of `policy`, by 1 - (1 - Q)^k."""
    value, quality = exact_values(policy)
    best = lambda q: 1.0 - (1.0 - q) ** k
    return best(quality) - best(value)[..., None]


def softmax(logits: Table) -> Table:
    """Probabilities over the last axis."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Run:
    """Exact probability of success after each iteration."""

    accuracy: list[float]

    @property
    def mean(self) -> float:
        return sum(self.accuracy) / len(self.accuracy)

    def iterations_to(self, level: float) -> int:
        """Iterations until the probability of success reaches `level`; all of them if it never does."""
        return next((i for i, a in enumerate(self.accuracy, 1) if a >= level), len(self.accuracy))


def policy_gradient(logits: Table, returns: np.ndarray, states: np.ndarray, tokens: np.ndarray) -> Table:
    """Gradient ascent direction of the mean over sequences of sum_h return_h log pi(a_h | s_h).

    Args: returns [B, LENGTH], 0 where a sequence has ended; states, tokens [B, LENGTH]. d log softmax = onehot - pi.
    """
    policy, gradient = softmax(logits), np.zeros_like(logits)
    for t in range(LENGTH):
        np.add.at(gradient[t], (states[:, t], tokens[:, t]), returns[:, t])
        total = np.bincount(states[:, t], weights=returns[:, t], minlength=MATCHED)
        gradient[t] -= total[:, None] * policy[t]
    return gradient / len(returns)


def sample(
    policy: Table, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(states, tokens, alive [B, LENGTH], reward [B]) of `count` sequences; after success or the end nothing is alive."""
    states, tokens = np.zeros((count, LENGTH), dtype=int), np.zeros((count, LENGTH), dtype=int)
    alive, matched = np.zeros((count, LENGTH), dtype=bool), np.zeros(count, dtype=int)
    going = np.ones(count, dtype=bool)
    for t in range(LENGTH):
        alive[:, t], states[:, t] = going, np.where(going, matched, 0)
        thresholds = policy[t].cumsum(1)[states[:, t]]
        tokens[:, t] = np.minimum((rng.random((count, 1)) > thresholds).sum(1), TOKENS - 1)
        ended = tokens[:, t] == END
        matched = np.where(going & ~ended, _NEXT[states[:, t], tokens[:, t]], matched)
        going &= ~ended & (matched < MATCHED)
    return states, tokens, alive, (matched == MATCHED).astype(float)


def train_policy(
    start: Table,
    advantages: Table | None,
    *,
    alpha: float = 1.0,
    iterations: int = 1500,
    batch: int = 64,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> Run:
    """Policy gradient on the sampled outcome plus alpha times the prover's advantage of each step (Eq. 5); None: outcome alone.

    Adam on the table of logits. The advantage of a step is not summed over the steps behind it: the prover's state distribution is
    that of the policy (Eq. 4), and summed it would be the outcome again.
    """
    rng = np.random.default_rng(seed)
    logits = np.log(start)
    first, second = np.zeros_like(logits), np.zeros_like(logits)
    accuracy = []
    for step in range(1, iterations + 1):
        policy = softmax(logits)
        states, tokens, alive, reward = sample(policy, batch, rng)
        returns = np.repeat(reward[:, None], LENGTH, 1)
        if advantages is not None:
            returns = returns + alpha * advantages[np.arange(LENGTH)[None], states, tokens]
        gradient = policy_gradient(logits, np.where(alive, returns, 0.0), states, tokens)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        logits = logits + learning_rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        accuracy.append(success(softmax(logits)))
    if not all(map(math.isfinite, accuracy)):
        raise FloatingPointError("the policy's logits are not finite")
    return Run(accuracy)
