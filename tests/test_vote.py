"""The vote, the weights that a start inherits, and the head in closed form."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from secateur.core.errors import LibraryError
from secateur.core.plan import dropped_indices
from secateur.prune import apply_plan, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from secateur.vote.ballot import (
    blend,
    confidence,
    keep_opinion,
    keep_top,
    overlap,
    score_opinion,
    tally,
    vote_weights,
)
from secateur.vote.inherit import SubNetwork, class_targets, embed, inherit, ridge_head

NAN = np.nan
WIDTHS = {"conv1": 5, "block.heads": 3, "block.mlp": 8}  # a CNN's channels, a ViT's: all the same


@st.composite
def opinions(draw, least: int = 1):
    """Voters' keep-sets over WIDTHS, each with at least one channel, and their similarities."""
    count = draw(st.integers(least, 5))
    kept = [
        {name: draw(st.sets(st.integers(0, width - 1), min_size=1)) for name, width in
         WIDTHS.items()}
        for _ in range(count)
    ]  # fmt: skip
    similar = draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count))
    return kept, similar


def as_opinion(kept):
    return {name: keep_opinion(WIDTHS[name], channels) for name, channels in kept.items()}


def own_scores():
    score = st.floats(0, 100, allow_subnormal=False)
    return st.fixed_dictionaries(
        {name: arrays(float, width, elements=score) for name, width in WIDTHS.items()}
    )


def test_the_similar_have_more_say() -> None:
    np.testing.assert_allclose(vote_weights([0.6, 0.2, -0.5]), [0.75, 0.25, 0])
    for nobody in ([], [0.0], [-1.0, 0.0]):
        with pytest.raises(LibraryError, match="similar to the new task"):
            vote_weights(nobody)


def test_votes_are_the_share_of_the_say_that_keeps_a_channel() -> None:
    voters = [{"a": keep_opinion(4, [0, 1])}, {"a": keep_opinion(4, [1, 2]), "b": np.ones(2)}]
    votes = tally(voters, vote_weights([0.75, 0.25]))
    np.testing.assert_allclose(votes["a"], [0.75, 1, 0.25, 0])
    np.testing.assert_allclose(votes["b"], [1, 1])  # of those who have the group
    partly = tally([{"a": np.array([1.0, NAN, NAN])}, {"a": np.array([0.0, 1.0, NAN])}],
                   np.array([0.5, 0.5]))  # fmt: skip
    np.testing.assert_allclose(partly["a"], [0.5, 1, NAN])


def test_a_score_vote_weighs_tasks_alike_whatever_their_scale() -> None:
    scores = {"depth": {"a": np.array([1.0, 3.0])}, "room": {"a": np.array([300.0, 100.0])}}
    np.testing.assert_allclose(score_opinion(scores)["a"], [0.5, 0.5])
    one_head = {"x": {"a": np.array([1.0]), "b": np.array([1.0])}, "y": {"a": np.array([2.0])}}
    np.testing.assert_allclose(score_opinion(one_head)["b"], [0.25])
    assert score_opinion({"x": {"a": np.zeros(2)}})["a"].tolist() == [0, 0]
    assert score_opinion({}) == {}


def test_voters_of_other_widths_do_not_vote_together() -> None:
    with pytest.raises(LibraryError, match="'a' has 2 and 3 channels"):
        tally([{"a": np.ones(2)}, {"a": np.ones(3)}], np.array([0.5, 0.5]))


@given(voters=opinions(), order=st.randoms())
def test_the_order_of_neighbours_does_not_matter(voters, order) -> None:
    kept, similar = voters
    pairs = list(zip(kept, similar, strict=True))
    order.shuffle(pairs)
    results = []
    for some in (list(zip(kept, similar, strict=True)), pairs):
        voiced = [as_opinion(each) for each, _ in some]
        weights = vote_weights([value for _, value in some])
        results.append((tally(voiced, weights), confidence(voiced, weights)))
    for name in WIDTHS:
        np.testing.assert_array_equal(results[0][0][name], results[1][0][name])
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-12)


@given(kept=opinions(), own=own_scores(), copies=st.integers(1, 4))
def test_identical_voters_reproduce_their_keep_set(kept, own, copies: int) -> None:
    wanted = kept[0][0]
    similar = (kept[1] * 4)[:copies]
    votes = tally([as_opinion(wanted)] * copies, vote_weights(similar))
    counts = {name: len(channels) for name, channels in wanted.items()}
    for scores in (votes, blend(votes, own, 1.0)):
        assert keep_top(scores, counts) == {n: tuple(sorted(c)) for n, c in wanted.items()}


@given(voters=opinions(), own=own_scores(), weight=st.floats(0, 1),
       share=st.floats(0, 1))  # fmt: skip
def test_exactly_k_channels_stay_and_no_group_is_emptied(voters, own, weight, share) -> None:
    kept, similar = voters
    votes = tally([as_opinion(each) for each in kept], vote_weights(similar))
    counts = {name: int(share * width) for name, width in WIDTHS.items()}
    top = keep_top(blend(votes, own, weight), counts)
    for name, channels in top.items():
        assert len(channels) == max(1, counts[name]) == len({*channels})
        assert list(channels) == sorted(channels) and channels[-1] < WIDTHS[name]


@given(voters=opinions(), own=own_scores(), weight=st.floats(0, 1))
def test_a_blend_hands_out_the_own_scores(voters, own, weight) -> None:
    kept, similar = voters
    votes = tally([as_opinion(each) for each in kept], vote_weights(similar))
    blended = blend(votes, own, weight)
    for name, values in own.items():
        top = max(values.max(), 1e-9)
        np.testing.assert_allclose(np.sort(blended[name]), np.sort(values), atol=2e-9 * top)
    without = blend(votes, own, 0.0)
    for name, values in own.items():
        np.testing.assert_allclose(without[name], values, atol=2e-9 * max(values.max(), 1e-9))


def test_without_a_vote_a_channel_keeps_its_own_rank() -> None:
    own = {"a": np.array([4.0, 3.0, 2.0, 1.0])}
    turned = blend({"a": np.array([0.0, 0.2, 0.8, 1.0])}, own, 1.0)
    np.testing.assert_allclose(turned["a"], [1, 2, 3, 4], atol=1e-6)
    np.testing.assert_allclose(blend({}, own, 1.0)["a"], own["a"], atol=1e-6)
    some = blend({"a": np.array([NAN, 0.0, 1.0, NAN])}, own, 1.0)
    assert keep_top(some, {"a": 2})["a"] == (0, 2)


@given(voters=opinions())
def test_confidence_stays_in_its_range(voters) -> None:
    kept, similar = voters
    found = confidence([as_opinion(each) for each in kept], vote_weights(similar))
    assert found.keys() == WIDTHS.keys() and all(0 <= value <= 1 for value in found.values())


@given(voters=opinions(), copies=st.integers(2, 5))
def test_confidence_is_1_when_all_agree(voters, copies: int) -> None:
    kept, similar = voters
    weights = vote_weights((similar * copies)[:copies])
    assert set(confidence([as_opinion(kept[0])] * copies, weights).values()) == {1.0}


def test_confidence_is_agreement_beyond_chance() -> None:
    half = np.array([0.5, 0.5])
    opposed = [{"a": keep_opinion(4, [0, 1])}, {"a": keep_opinion(4, [2, 3])}]
    assert confidence(opposed, half) == {"a": 0.0}
    rng = np.random.default_rng(0)
    drawn = [{"a": (rng.uniform(size=4000) < 0.3).astype(float)} for _ in range(4)]
    assert confidence(drawn, np.full(4, 0.25))["a"] < 0.05
    # by hand: p = 1, .5, .5, 0; p (1 - p) / (1 - sum w^2) = 0, .5, .5, 0; r (1 - r) = .25
    shared = [{"a": keep_opinion(4, [0, 1])}, {"a": keep_opinion(4, [0, 2])}]
    assert confidence(shared, half)["a"] == pytest.approx(1 - 0.25 / 0.25)
    three = [*shared, {"a": keep_opinion(4, [0, 1])}]  # p = 1, 2/3, 1/3, 0
    unsure = 2 * (2 / 9) / (2 / 3) / 4
    assert confidence(three, np.full(3, 1 / 3))["a"] == pytest.approx(1 - unsure / 0.25)
    assert confidence([shared[0]], np.ones(1)) == {"a": 0.0}  # nobody to agree with


def test_overlap_is_the_iou_over_all_groups() -> None:
    assert overlap({"a": (0, 1), "b": (2,)}, {"a": (1, 2), "b": (2,)}) == pytest.approx(2 / 4)
    assert overlap({"a": (0,)}, {}) == 0 and overlap({}, {}) == 1


# Inherited weights -----------------------------------------------------------------------------

PARENT = np.arange(24.0).reshape(4, 3, 2)  # a layer of 4 outputs and 3 inputs


def part(outputs, inputs, offset: float = 0.0) -> SubNetwork:
    """The parent's layer and its bias on some channels, each number moved by ``offset``."""
    weights = {
        "net.layer.weight": PARENT[np.ix_(outputs, inputs)].astype(np.float32) + offset,
        "net.layer.bias": np.arange(4.0)[list(outputs)] + offset,
        "net.norm.seen": np.array(7),
    }
    gone = {("net.layer", "out"): {*range(4)} - {*outputs},
            ("net.layer", "in"): {*range(3)} - {*inputs}}  # fmt: skip
    return SubNetwork(weights, gone)


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_a_cut_embedded_in_its_parents_shape_computes_what_it_did(
    example: torch.Tensor, share: float
) -> None:
    """A random cut whose weights have moved since, as recovery moves them."""
    model = tiny_model()
    groups, rng = find_groups(model, example), np.random.default_rng(0)
    scores = {group.name: rng.random(group.width) for group in groups}
    plan = plan_prune(groups, macs_model(model, groups, example), scores, {}, Budget(share, 1),
                      criterion="-", fusion="-")  # fmt: skip
    cut = apply_plan(model, groups, plan)
    for parameter in cut.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = {name: tensor.numpy() for name, tensor in cut.state_dict().items()}
    whole = copy.deepcopy(model)
    own = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    embedded = embed(own, SubNetwork(state, dropped_indices(groups, plan)))
    whole.load_state_dict({name: torch.tensor(array) for name, array in embedded.items()})
    for name, output in cut(example).items():
        torch.testing.assert_close(whole(example)[name], output, rtol=1e-4, atol=1e-5)


def test_embedding_leaves_a_layer_that_the_donor_lacks_as_it_is() -> None:
    whole = {"net.layer.weight": PARENT, "net.head.weight": np.ones((2, 4))}
    found = embed(whole, part([0, 2], [1], 100.0))
    assert (found["net.head.weight"] == 1).all()
    assert (found["net.layer.weight"][np.ix_([0, 2], [1])] > 99).all()
    assert np.count_nonzero(found["net.layer.weight"]) == 2 * 1 * 2


def test_what_both_have_is_inherited_and_the_rest_stays() -> None:
    result = inherit(part([0, 2, 3], [0, 1]), [part([2, 3], [1, 2], 100.0)], [1.0])
    wanted = part([0, 2, 3], [0, 1]).weights["net.layer.weight"].copy()
    wanted[1:, 1] += 100
    np.testing.assert_array_equal(result.weights["net.layer.weight"], wanted)
    np.testing.assert_array_equal(result.weights["net.layer.bias"], [0, 102, 103])
    assert result.weights["net.layer.weight"].dtype == np.float32
    assert result.weights["net.norm.seen"] == 7
    assert result.share == pytest.approx((4 + 2) / (12 + 3))


def test_a_bare_parameter_is_inherited_by_its_channels() -> None:
    whole = np.arange(12.0, dtype=np.float32).reshape(1, 3, 4)  # a position embedding

    def embedding(kept: list[int], offset: float) -> SubNetwork:
        gone = {*range(4)} - {*kept}
        return SubNetwork({"net.embed": whole[..., kept] + offset}, {}, {"net.embed": gone})

    found = inherit(embedding([0, 2], 0.0), [embedding([1, 2], 100.0)], [1.0]).weights["net.embed"]
    np.testing.assert_array_equal(found, whole[..., [0, 2]] + [0, 100])


def test_several_donors_are_averaged_where_they_share_a_channel() -> None:
    donors = [part([0, 1], [0, 1, 2], 10.0), part([1, 2], [0, 1, 2], 40.0)]
    result = inherit(part([0, 1, 2, 3], [0, 1, 2]), donors, [0.5, 0.25])
    moved = result.weights["net.layer.bias"] - np.arange(4.0)
    np.testing.assert_allclose(moved, [10, 20, 40, 0])


@given(outputs=st.sets(st.integers(0, 3), min_size=1), inputs=st.sets(st.integers(0, 2),
       min_size=1))  # fmt: skip
def test_a_donor_of_the_same_channels_gives_its_own_network(outputs, inputs) -> None:
    chosen = sorted(outputs), sorted(inputs)
    donor = part(*chosen, 3.5)
    result = inherit(part(*chosen), [donor], [0.2])
    for name, array in donor.weights.items():
        np.testing.assert_allclose(result.weights[name], array)
    assert result.share == 1.0


def test_a_tensor_of_another_architecture_stays() -> None:
    start = part([0, 1], [0, 1])
    wider = SubNetwork({"net.layer.weight": np.ones((9, 2, 2), np.float32)}, {})
    result = inherit(start, [wider], [1.0])
    assert result.share == 0
    for name, array in start.weights.items():
        np.testing.assert_array_equal(result.weights[name], array)
    with pytest.raises(LibraryError, match="no network to inherit"):
        inherit(start, [], [])


def test_a_head_in_closed_form_solves_what_is_linear() -> None:
    rng = np.random.default_rng(0)
    features, weight = rng.normal(size=(200, 6)) + 3, rng.normal(size=(4, 6))
    targets = features @ weight.T + [1, 2, 3, 4]
    found, bias = ridge_head(features, targets, ridge=1e-9)
    np.testing.assert_allclose(found, weight, atol=1e-6)
    np.testing.assert_allclose(features @ found.T + bias, targets, atol=1e-5)
    shrunk, middle = ridge_head(features, targets, ridge=1e9)
    assert np.abs(shrunk).max() < 1e-6
    np.testing.assert_allclose(middle, targets.mean(0), atol=1e-4)
    again, _ = ridge_head(1000 * features, targets, ridge=0.1)  # the ridge has no unit
    np.testing.assert_allclose(1000 * again, ridge_head(features, targets, ridge=0.1)[0])


def test_a_head_in_closed_form_tells_classes_apart() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    features = np.eye(3)[labels] @ rng.normal(size=(3, 8)) + 0.05 * rng.normal(size=(90, 8))
    weight, bias = ridge_head(features, class_targets(labels, 3))
    assert ((features @ weight.T + bias).argmax(1) == labels).all()
    constant, mean = ridge_head(np.ones((90, 8)), class_targets(labels, 3))
    assert not constant.any() and mean == pytest.approx(np.bincount(labels) / 90)


@pytest.mark.parametrize(
    ("features", "targets"),
    [(np.ones((3, 2)), np.ones((4, 1))), (np.ones(3), np.ones((3, 1))),
     (np.full((3, 2), NAN), np.ones((3, 1))), (np.ones((0, 2)), np.ones((0, 1)))],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(features, targets) -> None:
    with pytest.raises(LibraryError):
        ridge_head(features, targets)
    with pytest.raises(LibraryError, match="are not classes"):
        class_targets(np.array([0, 3]), 3)
