"""Pools and prefix tree under arbitrary use: nothing leaks, nothing freed is read, the tree says what a plain dictionary says."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from openling.errors import Failure
from openling.model.paged import PAGE
from openling.serve.pool import Pool
from openling.serve.radix import RadixTree, page_keys


def tokens_of(pages):
    """One page of equal tokens for each small number."""
    return [token for page in pages for token in [page] * PAGE]


def test_a_pool_refuses_what_would_corrupt_it():
    pool = Pool(2)
    a = pool.take()
    pool.share(a)
    pool.release(a)
    pool.release(a)
    with pytest.raises(Failure, match="twice"):
        pool.release(a)
    with pytest.raises(Failure, match="free page or slot was shared"):
        pool.share(a)
    pool.take()
    pool.take()
    with pytest.raises(IndexError):
        pool.take()


def test_a_leak_is_found():
    pool = Pool(3)
    held = [pool.take(), pool.take()]
    pool.check("pages", held)
    with pytest.raises(Failure, match="leaked"):
        pool.check("pages", held[:1])
    with pytest.raises(Failure, match="leaked"):
        pool.check("pages", [*held, held[0]])


def test_keys_are_exact_and_whole_pages_only():
    assert page_keys(range(PAGE - 1)) == []
    a, b = page_keys(range(2 * PAGE + 5))
    assert a != b
    assert page_keys(range(PAGE)) == [a]


class TreeMachine(RuleBasedStateMachine):
    """Requests hold their path; the model is which paths were inserted, and which states are where."""

    requests = Bundle("requests")
    paths = st.lists(st.integers(0, 2), min_size=1, max_size=5)
    names = st.sampled_from(["", "a"])

    def __init__(self):
        super().__init__()
        self.written = {}
        self.pages = Pool(14, on_free=lambda page: self.written.pop(page, None))
        self.slots = Pool(4)
        self.tree = RadixTree(self.pages, self.slots, recurrent=True)
        self.held = []

    @rule(target=requests, path=paths, name=names, with_state=st.booleans())
    def insert(self, path, name, with_state):
        keys = page_keys(tokens_of(path))
        known = self.tree.match(name, keys)
        own = []
        for node in known:
            self.pages.share(node.page)
            own.append(node.page)
        while len(own) < len(path):
            if not self.pages.free and not self.tree.evict_pages(1):
                for page in own:
                    self.pages.release(page)
                return None
            own.append(self.pages.take())
            self.written[own[-1]] = (name, tuple(path[: len(own)]))
        node, kept = self.tree.insert(name, keys, own, None)
        assert kept == own  # nobody else inserted meanwhile
        if with_state and node.state is None and (self.slots.free or self.tree.evict_state(node)):
            self.tree.attach(node, self.slots.take())
        self.held.append(own)
        return own

    @rule(request=consumes(requests))
    def finish(self, request):
        if request is not None and request in self.held:
            self.held.remove(request)
            for page in request:
                self.pages.release(page)

    @rule(path=paths, name=names)
    def look_up(self, path, name):
        found = self.tree.match(name, page_keys(tokens_of(path)))
        for depth, node in enumerate(found, start=1):
            assert self.written[node.page] == (name, tuple(path[:depth]))
        usable = self.tree.usable(found)
        assert usable == max((n.depth for n in found if n.state is not None), default=0)

    @rule()
    def lose_a_state(self):
        before = self.slots.free
        freed = self.tree.evict_state()
        assert self.slots.free == before + freed

    @rule(count=st.integers(1, 3))
    def lose_pages(self, count):
        before = self.pages.free
        freed = self.tree.evict_pages(count)
        assert self.pages.free == before + freed

    @rule()
    def flush(self):
        self.tree.flush()
        assert not list(self.tree.owned_pages())

    @invariant()
    def everything_has_an_owner(self):
        self.pages.check("pages", [*self.tree.owned_pages(), *(page for own in self.held for page in own)])
        self.slots.check("slots", self.tree.owned_slots())


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_of_equally_old_states_the_cheapest_to_compute_again_goes():
    pages, slots = Pool(10), Pool(3)
    tree = RadixTree(pages, slots, recurrent=True)
    own = [pages.take() for _ in range(5)]
    keys = page_keys(tokens_of([0, 1, 2, 3, 4]))
    far, _ = tree.insert("", keys[:4], own[:4], None)
    tree.attach(far, slots.take())
    near, _ = tree.insert("", keys[4:], own[4:], far)
    tree.attach(near, slots.take())
    tree.evict_state()
    assert near.state is None
    assert far.state is not None
    assert tree.usable(tree.match("", keys)) == 4


def test_pages_that_a_request_holds_stay_and_the_rest_goes():
    pages, slots = Pool(4), Pool(1)
    tree = RadixTree(pages, slots, recurrent=False)
    own = [pages.take() for _ in range(4)]
    tree.insert("", page_keys(tokens_of([0, 1, 2, 3])), own, None)
    for page in own[2:]:
        pages.release(page)
    assert tree.evict_pages(10) == 2
    assert [node.depth for node in tree.match("", page_keys(tokens_of([0, 1, 2, 3])))] == [1, 2]


def test_namespaces_share_nothing():
    pages = Pool(4)
    tree = RadixTree(pages, Pool(0), recurrent=False)
    tree.insert("a", page_keys(tokens_of([0])), [pages.take()], None)
    assert tree.match("b", page_keys(tokens_of([0]))) == []
