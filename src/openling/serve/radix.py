"""Cached prefixes: a tree over token ids, one page of tokens per node, whose nodes may own a copy of the Lightning states there.

A request can start behind the deepest node on its path that has a state; pages alone say nothing about the states. In a model
without Lightning layers every node is such a place. Requests of different namespaces never meet.

The tree holds one reference to each of its pages and slots. A page that a request holds too is in use and stays; the others go
when room is needed: leaves only, least recently used first, those first that nobody could start behind. A state goes by itself
(its node stays, a tombstone): of the least recently used ones the one that saves the fewest tokens.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice

from openling.model.paged import PAGE
from openling.serve.pool import Pool

# Among how many of the least recently used entries the cheapest to lose is chosen.
CANDIDATES = 8


class Node:
    """One page of tokens behind its parent's. depth: pages up to and with this one; key: its tokens as bytes."""

    __slots__ = ("children", "depth", "key", "page", "parent", "state")

    def __init__(self, key: bytes, parent: Node | None, page: int, depth: int) -> None:
        self.key, self.parent, self.page, self.depth = key, parent, page, depth
        self.children: dict[bytes, Node] = {}
        self.state: int | None = None


def page_keys(tokens: Sequence[int]) -> list[bytes]:
    """The keys of all whole pages of a sequence."""
    whole = len(tokens) // PAGE * PAGE
    data = array("q", tokens[:whole]).tobytes()
    step = PAGE * 8
    return [data[i : i + step] for i in range(0, len(data), step)]


class RadixTree:
    """The cached prefixes over a pool of pages and one of slots; `recurrent`: a hit needs a state."""

    def __init__(self, pages: Pool, slots: Pool, *, recurrent: bool) -> None:
        self.pages, self.slots, self.recurrent = pages, slots, recurrent
        self._roots: dict[str, Node] = {}
        self._leaves: OrderedDict[Node, None] = OrderedDict()
        self._states: OrderedDict[Node, None] = OrderedDict()

    def match(self, namespace: str, keys: Sequence[bytes]) -> list[Node]:
        """The nodes along `keys`, as far as they are known; all count as used now."""
        path: list[Node] = []
        node = self._roots.get(namespace)
        for key in keys:
            node = node.children.get(key) if node is not None else None
            if node is None:
                break
            path.append(node)
        for node in path:
            if node.state is not None:
                self._states.move_to_end(node)
        if path and path[-1] in self._leaves:
            self._leaves.move_to_end(path[-1])
        return path

    def usable(self, path: Sequence[Node]) -> int:
        """How many pages of a path can be taken over: up to the deepest state."""
        if not self.recurrent:
            return len(path)
        return next((node.depth for node in reversed(path) if node.state is not None), 0)

    def insert(self, namespace: str, keys: Sequence[bytes], pages: Sequence[int], behind: Node | None) -> tuple[Node, list[int]]:
        """Add pages behind a node (None: from the start); returns the last node and the pages that lie there now.

        Where a node exists already its page stays and the given one is not taken. The caller holds all of `behind`'s path.
        """
        node = behind or self._roots.setdefault(namespace, Node(b"", None, -1, 0))
        kept: list[int] = []
        for key, page in zip(keys, pages, strict=True):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(key, node, page, node.depth + 1)
                self.pages.share(page)
                self._leaves.pop(node, None)
                self._leaves[child] = None
            node = child
            kept.append(node.page)
        return node, kept

    def attach(self, node: Node, slot: int) -> None:
        """Give a node the state after its last token; the tree takes over the caller's reference."""
        assert node.state is None
        node.state = slot
        self._states[node] = None

    def detach(self, node: Node) -> int:
        """Take a node's state back, reference and all."""
        assert node.state is not None
        slot, node.state = node.state, None
        del self._states[node]
        return slot

    def evict_state(self, keep: Node | None = None) -> bool:
        """Free the slot that is cheapest to lose, `keep`'s excepted; False if there is none."""
        oldest = list(islice((node for node in self._states if node is not keep), CANDIDATES))
        if not oldest:
            return False
        self.slots.release(self.detach(min(oldest, key=_saving)))
        return True

    def evict_pages(self, wanted: int) -> int:
        """Free up to so many pages that nobody else holds, from the leaves; returns how many."""
        freed = 0
        while freed < wanted:
            leaves = list(islice((leaf for leaf in self._leaves if self.pages.references[leaf.page] == 1), CANDIDATES))
            if not leaves:
                break
            leaf: Node | None = next((x for x in leaves if x.state is None), leaves[0]) if self.recurrent else leaves[0]
            while leaf is not None and freed < wanted:
                leaf, freed = self._remove(leaf), freed + 1
        return freed

    def _remove(self, leaf: Node) -> Node | None:
        """Free a leaf; its parent, if that is a leaf of no use now."""
        del self._leaves[leaf]
        if leaf.state is not None:
            self.slots.release(self.detach(leaf))
        self.pages.release(leaf.page)
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.key]
        leaf.parent = None
        if parent.children:
            return None
        if parent.parent is None:
            self._roots = {name: root for name, root in self._roots.items() if root is not parent}
            return None
        self._leaves[parent] = None
        self._leaves.move_to_end(parent, last=False)
        free = self.pages.references[parent.page] == 1
        return parent if free and self.recurrent and parent.state is None else None

    def flush(self) -> None:
        """Forget everything: the weights have changed, or somebody wants the room."""
        for node in list(self._nodes()):
            if node.state is not None:
                self.slots.release(self.detach(node))
            self.pages.release(node.page)
        self._roots.clear()
        self._leaves.clear()

    def owned_pages(self) -> Iterator[int]:
        """Every page the tree holds."""
        return (node.page for node in self._nodes())

    def owned_slots(self) -> Iterator[int]:
        """Every slot the tree holds."""
        return (node.state for node in self._states if node.state is not None)

    def _nodes(self) -> Iterator[Node]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node


def _saving(node: Node) -> int:
    """Tokens to compute again if this state were gone: back to the next one above."""
    above = node.parent
    while above is not None and above.state is None:
        above = above.parent
    return PAGE * (node.depth - (above.depth if above is not None else 0))
