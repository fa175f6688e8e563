"""The solver: what constraints on ids amount to, against the plain meaning of the constraints.

A set of ids leaves together when every constraint still holds without it: equal ids both or neither, an entry of a
product exactly when one of its factors leaves, frozen ids never. Whatever the solver says about units has to obey
that; `obeys` checks it id by id, without the solver's own data.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from only_train_once.labels import Kind, Label, LabelStore, Mark, Solution, kinds_of

DETERMINISTIC = settings(derandomize=True, database=None, deadline=None, max_examples=150)


def units(solution: Solution) -> np.ndarray:
    """The classes that can leave: those that some class leaves with, and that are not frozen."""
    free = np.zeros(len(solution.frozen), dtype=bool)
    free[np.unique(solution.members.indices)] = True
    return np.flatnonzero(free & ~solution.frozen)


def removed(solution: Solution, chosen: np.ndarray) -> np.ndarray:
    """(ids,) whether an id leaves when the units ``chosen`` leave."""
    gone = np.asarray(solution.members[:, chosen].sum(axis=1)).reshape(-1) > 0
    return gone[solution.of_id]


def obeys(store: LabelStore, gone: np.ndarray) -> bool:
    """Whether every constraint of the store holds when exactly the ids ``gone`` leave."""
    for a, b in store.edges:
        if (gone[np.asarray(a)] != gone[np.asarray(b)]).any():
            return False
    for product in store.products:
        expected = np.zeros(product.out.shape, dtype=bool)
        for axis, factor in enumerate(product.factors):
            shape = [1] * product.out.ndim
            shape[axis] = len(factor)
            expected = expected | gone[factor].reshape(shape)
        if (gone[product.out] != expected).any():
            return False
    return not any(gone[ids].any() for ids, _ in store.freezes)


def consistent(store: LabelStore) -> Solution:
    """Solve, and check every unit alone and some together."""
    solution = store.solve()
    free = units(solution)
    random = np.random.default_rng(0)
    sets = [np.array([u]) for u in free[:40]] + [free]
    sets += [random.permutation(free)[: random.integers(0, len(free) + 1)] for _ in range(5)]
    for chosen in sets:
        assert obeys(store, removed(solution, chosen)), f"a constraint breaks without the units {chosen}"
    return solution


def together(solution: Solution, a: int, b: int) -> bool:
    return bool(solution.of_id[a] == solution.of_id[b])


def frozen(solution: Solution, label: Label) -> np.ndarray:
    return solution.frozen[solution.of_id[label.ids]]


def reason(solution: Solution, label: Label) -> str:
    found = solution.reason[solution.of_id[label.ids[0]]]
    return solution.reasons[found] if found >= 0 else ""


# ---------------------------------------------------------------- equalities


def test_nothing_said_means_every_id_is_a_unit() -> None:
    store = LabelStore()
    store.fresh(5, True)
    assert len(units(consistent(store))) == 5


def test_an_empty_store_solves() -> None:
    assert len(LabelStore().solve().of_id) == 0


def test_equal_ids_leave_together_through_any_number_of_steps() -> None:
    store = LabelStore()
    a, b, c = (store.fresh(4, True) for _ in range(3))
    store.equal(a.ids, b.ids[::-1])
    store.equal(b.ids, c.ids)
    solution = consistent(store)
    assert together(solution, int(a.ids[0]), int(c.ids[3]))
    assert len(units(solution)) == 4


def test_a_freeze_reaches_what_is_equal_and_the_first_reason_stays() -> None:
    store = LabelStore()
    a, b = store.fresh(3, True), store.fresh(3, True)
    store.equal(a.ids, b.ids)
    store.freeze(a.ids[1:2], "first")
    store.freeze(b.ids[1:2], "second")
    solution = consistent(store)
    assert frozen(solution, b).tolist() == [False, True, False]
    assert reason(solution, b.take(slice(1, 2))) == "first"


def test_freezing_no_ids_leaves_no_reason() -> None:
    store = LabelStore()
    store.freeze(np.empty(0, dtype=np.int64), "nothing")
    assert store.reasons == []


# ---------------------------------------------------------------- one product


def test_a_split_gives_two_independent_axes() -> None:
    store = LabelStore()
    whole = store.fresh(12, True)
    heads, dims = store.split(whole, [3, 4])
    assert heads is not None
    assert dims is not None
    solution = consistent(store)
    assert len(units(solution)) == 3 + 4
    gone = removed(solution, solution.of_id[heads.ids[1:2]])
    assert gone[whole.ids].reshape(3, 4).tolist() == [[False] * 4, [True] * 4, [False] * 4]


def test_merging_what_was_split_gives_the_same_ids() -> None:
    store = LabelStore()
    whole = store.fresh(12, True)
    heads, dims = store.split(whole, [3, 4])
    merged = store.merge([heads, dims], [3, 4])
    assert merged is not None
    solution = consistent(store)
    assert (solution.of_id[merged.ids] == solution.of_id[whole.ids]).all()


def test_splitting_what_was_merged_gives_the_factors_back() -> None:
    store = LabelStore()
    a, b = store.fresh(3, True), store.fresh(4, False)
    merged = store.merge([a, b], [3, 4])
    assert merged is not None
    back = store.split(merged, [3, 4])
    assert back[0] is not None
    assert back[1] is not None
    assert (back[0].ids == a.ids).all()
    assert (back[1].ids == b.ids).all()
    # an entry is zero only where both factors are, so neither axis is zero any more
    assert not merged.zero.any()
    assert not back[0].zero.any()


def test_a_repeated_dim_merges_into_repeated_ids() -> None:
    store = LabelStore()
    a = store.fresh(3, True)
    merged = store.merge([a, None], [3, 2])
    assert merged is not None
    assert merged.ids.tolist() == np.repeat(a.ids, 2).tolist()
    back = store.split(merged, [3, 2])
    assert back[1] is None
    assert back[0] is not None
    assert (back[0].ids == a.ids).all()
    assert store.merge([None, None], [3, 2]) is None


def test_splitting_a_tiled_label_knows_which_axis_repeats() -> None:
    store = LabelStore()
    a = store.fresh(4, True)
    tiled = Label(np.tile(a.ids, 3), np.tile(a.zero, 3))
    outer, inner = store.split(tiled, [3, 4])
    assert outer is None
    assert inner is not None
    assert (inner.ids == a.ids).all()


def test_a_frozen_factor_drops_out_and_ties_what_it_spread_over() -> None:
    store = LabelStore()
    whole = store.fresh(6, True)
    outer, inner = store.split(whole, [2, 3])
    assert outer is not None
    assert inner is not None
    store.freeze(outer.ids, "outer")
    solution = consistent(store)
    assert len(units(solution)) == 3
    assert together(solution, int(whole.ids[1]), int(whole.ids[4]))
    assert together(solution, int(whole.ids[1]), int(inner.ids[1]))


def test_frozen_factors_freeze_the_product() -> None:
    store = LabelStore()
    whole = store.fresh(6, True)
    for factor in store.split(whole, [2, 3]):
        assert factor is not None
        store.freeze(factor.ids, "both")
    assert frozen(consistent(store), whole).all()


def test_an_entry_that_stays_keeps_its_factors_and_no_others() -> None:
    store = LabelStore()
    whole = store.fresh(6, True)
    outer, inner = store.split(whole, [2, 3])
    assert outer is not None
    assert inner is not None
    store.freeze(whole.ids[4:5], "one entry")  # row 1, column 1
    solution = consistent(store)
    assert frozen(solution, outer).tolist() == [False, True]
    assert frozen(solution, inner).tolist() == [False, True, False]
    assert reason(solution, inner.take(slice(1, 2))) == "one entry"


def test_equal_factors_make_equal_products_and_the_other_way_round() -> None:
    store = LabelStore()
    a, b = store.fresh(6, True), store.fresh(6, True)
    (a1, a2), (b1, b2) = store.split(a, [2, 3]), store.split(b, [2, 3])
    assert a1 is not None
    assert a2 is not None
    assert b1 is not None
    assert b2 is not None
    store.equal(a1.ids, b1.ids)
    store.equal(a2.ids, b2.ids)
    solution = consistent(store)
    assert (solution.of_id[a.ids] == solution.of_id[b.ids]).all()

    store = LabelStore()
    a, b = store.fresh(6, True), store.fresh(6, True)
    (a1, a2), (b1, b2) = store.split(a, [2, 3]), store.split(b, [2, 3])
    assert a2 is not None
    assert b2 is not None
    store.equal(a.ids, b.ids)
    solution = consistent(store)
    assert (solution.of_id[a2.ids] == solution.of_id[b2.ids]).all()
    assert len(units(solution)) == 2 + 3


def test_a_dim_tied_to_its_own_factor_freezes_the_others() -> None:
    store = LabelStore()
    whole = store.fresh(6, True)
    outer, inner = store.split(whole, [2, 3])
    assert outer is not None
    assert inner is not None
    store.equal(whole.ids[:3], inner.ids)
    solution = consistent(store)
    assert frozen(solution, outer)[0]


def test_rows_that_are_all_one_row_cannot_leave_but_columns_can() -> None:
    store = LabelStore()
    rows, columns = store.fresh(256, True), store.fresh(2, True)
    merged = store.merge([rows, columns], [256, 2])
    assert merged is not None
    grid = merged.ids.reshape(256, 2)
    store.equal(grid, np.broadcast_to(grid[:1], grid.shape))
    solution = consistent(store)
    assert frozen(solution, rows).all()
    assert not frozen(solution, columns).any()


@pytest.mark.parametrize("times", [127, 128, 256])
def test_an_entry_met_many_times_still_leaves_with_its_factors(times: int) -> None:
    """As often as 128 and 256 times, where a count of paths in 8 bits would come out negative or as none."""
    store = LabelStore()
    a, b = store.fresh(2, True), store.fresh(3, True)
    small = store.merge([a, b], [2, 3])
    large = store.merge([Label(np.repeat(a.ids, times), np.repeat(a.zero, times)), b], [2 * times, 3])
    assert small is not None
    assert large is not None
    store.equal(large.ids, np.repeat(small.ids.reshape(2, 3), times, axis=0).reshape(-1))
    assert len(units(consistent(store))) == 5


# ---------------------------------------------------------------- several products


def test_a_finer_factorization_refines_a_coarser_one() -> None:
    store = LabelStore()
    whole = store.fresh(24, True)
    a, bc = store.split(whole, [2, 12])
    _, b, c = store.split(whole, [2, 3, 4])
    assert a is not None
    assert bc is not None
    assert b is not None
    assert c is not None
    solution = consistent(store)
    assert len(units(solution)) == 2 + 3 + 4
    gone = removed(solution, solution.of_id[b.ids[:1]])
    assert gone[bc.ids].reshape(3, 4).tolist() == [[True] * 4, [False] * 4, [False] * 4]


@pytest.mark.parametrize("order", [1, -1])
def test_refinement_does_not_depend_on_the_order(order: int) -> None:
    store = LabelStore()
    whole = store.fresh(24, True)
    for sizes in [[6, 4], [2, 3, 4], [2, 12]][::order]:
        store.split(whole, sizes)
    assert len(units(consistent(store))) == 2 + 3 + 4


@pytest.mark.parametrize(("first", "second"), [([3, 4], [4, 3]), ([2, 6], [3, 4])])
def test_factorizations_that_do_not_nest_freeze(first: list[int], second: list[int]) -> None:
    store = LabelStore()
    whole = store.fresh(12, True)
    store.split(whole, first)
    store.split(whole, second)
    solution = consistent(store)
    assert not len(units(solution))
    assert f"one dim is read as {first} and as {second}" in solution.reasons


def test_a_conflict_reaches_what_is_equal_but_not_the_rest() -> None:
    store = LabelStore()
    whole, other, free = store.fresh(12, True), store.fresh(12, True), store.fresh(3, True)
    store.split(whole, [3, 4])
    store.split(other, [4, 3])
    store.equal(whole.ids, other.ids)
    assert len(units(consistent(store))) == len(free)


def test_products_that_share_some_entries_cannot_break_each_other() -> None:
    """A dim is split alone, and again as the front of a concatenation: the two grids do not line up."""
    store = LabelStore()
    front, back = store.fresh(8, True), store.fresh(4, True)
    store.split(front, [2, 4])
    store.split(Label(np.r_[front.ids, back.ids], np.r_[front.zero, back.zero]), [2, 6])
    assert not len(units(consistent(store)))


def test_products_that_share_whole_rows_keep_their_columns() -> None:
    """Two rows of four alone, three rows of four with what follows: the columns are the same ones."""
    store = LabelStore()
    front, back = store.fresh(8, True), store.fresh(4, True)
    _, columns = store.split(front, [2, 4])
    _, same = store.split(Label(np.r_[front.ids, back.ids], np.r_[front.zero, back.zero]), [3, 4])
    assert columns is not None
    assert same is not None
    store.equal(columns.ids, same.ids)
    assert len(units(consistent(store))) >= 4


def test_products_of_products_close_over_all_levels() -> None:
    store = LabelStore()
    labels = [store.fresh(2, True) for _ in range(5)]
    merged: Label | None = labels[0]
    for label in labels[1:]:
        assert merged is not None
        merged = store.merge([merged, label], [len(merged), 2])
    assert merged is not None
    solution = consistent(store)
    assert len(units(solution)) == 10
    for label in labels:
        gone = removed(solution, solution.of_id[label.ids[:1]])
        assert gone[merged.ids].sum() == 16
    assert len(np.unique(solution.component)) == 1


def test_components_separate_what_nothing_connects() -> None:
    store = LabelStore()
    a, b = store.fresh(4, True), store.fresh(4, True)
    store.split(a, [2, 2])
    solution = consistent(store)
    parts = solution.component[solution.of_id]
    assert len(set(parts[a.ids])) == 1
    assert not set(parts[a.ids]) & set(parts[b.ids])


# ---------------------------------------------------------------- marks


def test_a_unit_that_takes_part_of_a_normalized_stream_is_width() -> None:
    store = LabelStore()
    stream, hidden = store.fresh(6, True), store.fresh(6, True)
    store.mark(stream.ids, Mark.NORMALIZED)
    store.mark(stream.ids, Mark.STREAM)
    heads, dims = store.split(stream, [2, 3])
    assert heads is not None
    assert dims is not None
    store.mark(heads.ids, Mark.HEAD)
    solution = consistent(store)
    kinds = kinds_of(solution)
    assert kinds[Kind.WIDTH][solution.of_id[heads.ids]].all()
    assert kinds[Kind.WIDTH][solution.of_id[dims.ids]].all()
    assert kinds[Kind.HEAD][solution.of_id[heads.ids]].all()
    assert not kinds[Kind.WIDTH][solution.of_id[hidden.ids]].any()


# ---------------------------------------------------------------- at random


@st.composite
def stores(draw: st.DrawFn) -> LabelStore:
    """Labels that are split, merged, cut, joined, tied and frozen at random."""
    store = LabelStore()
    labels = [store.fresh(draw(st.sampled_from([4, 6, 8, 12])), True) for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(1, 7))):
        label = draw(st.sampled_from(labels))
        action = draw(st.sampled_from(["split", "split", "merge", "tie", "take", "join", "flip", "repeat", "freeze"]))
        n = len(label)
        if action == "split":
            sizes = [[a, n // a] for a in range(2, n) if n % a == 0]
            sizes += [[a, b, n // (a * b)] for a in (2, 3) for b in (2, 3) if n % (a * b) == 0 and n > a * b]
            if sizes:
                labels += [part for part in store.split(label, draw(st.sampled_from(sizes))) if part is not None]
        elif action == "merge":
            other = draw(st.sampled_from(labels))
            if n * len(other) <= 48:
                merged = store.merge([label, other], [n, len(other)])
                assert merged is not None
                labels.append(merged)
        elif action == "tie":
            same = [other for other in labels if len(other) == n]
            store.equal(label.ids, draw(st.sampled_from(same)).ids)
        elif action == "take" and n > 2:
            start = draw(st.integers(0, n - 2))
            labels.append(label.take(slice(start, draw(st.integers(start + 1, n)))))
        elif action == "join":
            other = draw(st.sampled_from(labels))
            if n + len(other) <= 48:
                labels.append(Label(np.r_[label.ids, other.ids], np.r_[label.zero, other.zero]))
        elif action == "flip":
            labels.append(label.take(slice(None, None, -1)))
        elif action == "repeat" and n <= 12:
            labels.append(Label(np.repeat(label.ids, 2), np.repeat(label.zero, 2)))
        elif action == "freeze":
            store.freeze(label.ids[: draw(st.integers(1, n))], f"freeze {len(store.freezes)}")
    return store


@DETERMINISTIC
@given(stores())
def test_any_units_obey_all_constraints(store: LabelStore) -> None:
    solution = consistent(store)
    # frozen ids have a reason, and what leaves with a unit is not frozen
    assert ((solution.reason >= 0) == solution.frozen).all()
    gone = removed(solution, units(solution))
    assert not (gone & solution.frozen[solution.of_id]).any()


@DETERMINISTIC
@given(stores())
def test_solving_twice_gives_the_same_answer(store: LabelStore) -> None:
    first, second = store.solve(), store.solve()
    assert (first.of_id == second.of_id).all()
    assert (first.frozen == second.frozen).all()
    assert (first.members != second.members).nnz == 0


@DETERMINISTIC
@given(stores(), st.data())
def test_a_further_freeze_frees_nothing(store: LabelStore, data: st.DataObject) -> None:
    before = store.solve()
    stuck = before.frozen[before.of_id]
    target = data.draw(st.integers(0, store.count - 1))
    store.freeze(np.array([target]), "further")
    after = consistent(store)
    assert after.frozen[after.of_id[target]]
    assert after.frozen[after.of_id[stuck]].all()


# ---------------------------------------------------------------- size


def test_long_chains_solve_without_recursion() -> None:
    """5,000 equalities, 5,000 products side by side, and products nested 300 deep."""
    store = LabelStore()
    labels = [store.fresh(4, True) for _ in range(5000)]
    for a, b in pairwise(labels):
        store.equal(a.ids, b.ids)
    for label in labels:
        store.split(label, [2, 2])
    solution = store.solve()
    assert len(units(solution)) == 4
    store = LabelStore()
    label = store.fresh(4, True)
    for _ in range(5000):  # each layer reads its heads and puts them together again
        heads, dims = store.split(label, [2, 2])
        merged = store.merge([dims, heads], [2, 2])
        assert merged is not None
        label = merged
    assert len(units(store.solve())) == 4
    store = LabelStore()
    nested: Label | None = store.fresh(2, True)
    for _ in range(300):
        assert nested is not None
        nested = store.merge([nested.take(slice(0, 2)), store.fresh(2, True)], [2, 2])
    assert len(units(store.solve())) == 2 * 301
