"""Costs add up."""

from __future__ import annotations

import time

import pytest

from stepladder.models.ledger import Ledger


def test_flops_are_two_a_parameter_and_token():
    ledger = Ledger()
    ledger.add_policy(10, generated=3, prefilled=4, calls=2)
    ledger.add_reward(100, 5)
    assert ledger == Ledger(3, 4, 5, 2, 2 * 10 * 7 + 2 * 100 * 5)


def test_sums_differences_and_copies():
    one, two = Ledger(1, 2, 3, 4, 5.0, 6.0), Ledger(10, 20, 30, 40, 50.0, 60.0)
    assert one + two == Ledger(11, 22, 33, 44, 55.0, 66.0)
    assert one + two - one == two
    copy = one.copy()
    copy.add_reward(1, 1)
    assert one == Ledger(1, 2, 3, 4, 5.0, 6.0)
    assert Ledger(**one.to_json()) == one


def test_seconds_are_added_also_when_something_fails():
    ledger = Ledger()

    def fail():
        with ledger.timed():
            time.sleep(0.02)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert 0.015 < ledger.seconds < 2
