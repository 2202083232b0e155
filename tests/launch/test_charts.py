"""The plots of the report: round ticks, labels that keep apart, marks where the numbers are."""

from __future__ import annotations

import itertools

import pytest

from stepladder.launch import charts


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.12, 0.69, [0.2, 0.3, 0.4, 0.5, 0.6]),
        (-0.5, 0.5, [-0.4, -0.2, 0, 0.2, 0.4]),
    ],
)
def test_ticks_are_round(low, high, want):
    assert charts.ticks(low, high) == want


def test_log_ticks_are_three_or_more():
    assert charts.log_ticks(5, 5000) == [10, 100, 1000]
    assert charts.log_ticks(12e3, 500e3) == pytest.approx([3e4, 1e5, 3e5])
    for low in (1.0, 19_806 / 1.6, 3e5 / 1.6):
        found = charts.log_ticks(low, low * 2.56)
        assert found
        assert all(low <= t <= low * 2.56 for t in found)


def test_spread_keeps_order_and_distance():
    found = charts.spread([50, 52, 51, 10, 99], 10, 100)
    assert found[3] == 10
    assert found[0] < found[2] < found[1] < found[4] <= 100
    ordered = sorted(found)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert charts.spread([], 10, 100) == []
    assert charts.spread([20, 60], 10, 100) == [20, 60]


def test_interval_chart_draws_where_the_numbers_are():
    page = charts.interval_chart([("greedy", [(44.2, 39.8, 48.6), None])], ["base", "improved"], "accuracy, %")
    assert 'x1="39.80%"' in page
    assert 'x2="48.60%"' in page
    assert '<svg x="44.20%"' in page
    assert page.count(">44.2<") == 1
