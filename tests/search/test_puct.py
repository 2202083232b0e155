"""The core that both tree searches share: selection, back-up and closing, on nodes made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from stepladder.search.puct import back_up, close, puct, select, upwards


@dataclass(eq=False)
class Node:
    name: str
    parent: Node | None = None
    visits: int = 0
    total: float = 0.0
    closed: bool = False
    children: list[Node] = field(default_factory=list)

    def child(self, name: str, **fields: bool) -> Node:
        self.children.append(Node(name, self, **fields))
        return self.children[-1]


def test_puct_by_hand():
    assert puct(0.5, 0.25, 16, 3, 1.25) == 0.5 + 1.25 * 0.25 * 4 / 4
    assert puct(-1.0, 0.5, 0, 0, 2.0) == -1.0  # nothing has been tried: the priors say nothing yet


def test_a_simulation_goes_to_the_most_appealing_open_child_and_the_first_of_equals():
    root = Node("root")
    a, b, c = root.child("a"), root.child("b"), root.child("c", closed=True)
    deep = b.child("deep")
    b.child("other")
    appeal = {"a": 1.0, "b": 1.0, "c": 9.0, "deep": 0.5, "other": 0.4}
    go = lambda: select(root, lambda node: appeal[node.name]).name
    assert go() == "a"  # of equals the first, and never the closed one
    appeal["b"] = 2.0
    assert go() == "deep"
    deep.closed = True
    assert go() == "other"
    assert select(c, lambda node: pytest.fail("it has no children")) is c
    assert [node.name for node in upwards(deep)] == ["deep", "b", "root"]
    assert a.children == []


def test_back_up_counts_on_the_way_and_nowhere_else():
    root = Node("root")
    a, b = root.child("a"), root.child("b")
    end = a.child("end")
    for node, value in ((end, 1.0), (a, -0.5), (b, 0.25)):
        back_up(node, value)
    assert [(n.visits, n.total) for n in (root, a, b, end)] == [(3, 0.75), (2, 0.5), (1, 0.25), (1, 1.0)]


def test_a_node_closes_with_its_last_child_and_takes_what_is_above_along():
    root = Node("root")
    a, b = root.child("a"), root.child("b")
    first, last = a.child("first", closed=True), a.child("last")
    close(a)
    assert not any(node.closed for node in (root, a, b))
    last.closed = True
    close(a)
    assert (a.closed, root.closed) == (True, False)  # b is open
    b.closed = True
    close(root)
    assert root.closed
    assert first.closed
