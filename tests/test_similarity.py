"""Measures of task similarity: their ranges, what they are blind to, and what they must see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from secateur.core import registry
from secateur.core.errors import LibraryError
from secateur.vote.similarity import cka, leep, mean_feature, score_cosine, task2vec
from secateur.vote.similarity.measure import measure_of

MEASURES = {"cka", "leep", "mean_feature", "score_cosine", "task2vec"}
few = settings(max_examples=60, deadline=None)
sizes = st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0, 7.0, 1e6])
scores = arrays(np.float64, 7, elements=sizes)


def test_the_folder_is_the_registry() -> None:
    assert registry.entries("secateur.vote.similarity").keys() == MEASURES
    for name in MEASURES:
        assert "0.500" in measure_of(name).explained.format(value=0.5)
    with pytest.raises(LibraryError, match="not a measure") as caught:
        measure_of("magic")
    assert "score_cosine" in caught.value.hint


@few
@given(arrays(np.float64, (4, 5), elements=st.floats(-1e3, 1e3)),
       arrays(np.float64, (6, 5), elements=st.floats(-1e3, 1e3)))  # fmt: skip
def test_mean_feature(one, two) -> None:
    a, b = mean_feature.sketch(one), mean_feature.sketch(two)
    value = mean_feature.similarity(a, b)
    assert a.shape == (5,) and -1 <= value <= 1
    assert value == pytest.approx(mean_feature.similarity(b, a), abs=1e-12)
    assert mean_feature.similarity(a, a) == pytest.approx(float(a.any()))
    assert mean_feature.similarity(a, -a) == pytest.approx(-float(a.any()))
    assert mean_feature.similarity(mean_feature.sketch(one[::-1]), b) == pytest.approx(
        value, abs=1e-4
    )


@few
@given(scores, scores)
def test_score_cosine(one, two) -> None:
    a, b = (score_cosine.sketch({"t": {"x": v[:3], "y": v[3:]}}) for v in (one, two))
    value = score_cosine.similarity(a, b)
    assert a.shape == (7,) and 0 <= value <= 1
    assert value == pytest.approx(score_cosine.similarity(b, a), abs=1e-12)
    assert score_cosine.similarity(a, a) == pytest.approx(float(a.any()))
    scaled = score_cosine.sketch({"t": {"y": 9 * one[3:], "x": one[:3]}})  # a group's own scale
    np.testing.assert_allclose(scaled, a, atol=1e-6)


def test_score_cosine_is_the_mean_over_groups_and_hears_every_task() -> None:
    ones, first, second = np.ones(100), np.array([1.0, 0.0]), np.array([0.0, 1.0])
    a = score_cosine.sketch({"t": {"wide": ones, "narrow": first}})
    b = score_cosine.sketch({"t": {"wide": ones, "narrow": second}})
    assert score_cosine.similarity(a, b) == pytest.approx(0.5)
    both = score_cosine.sketch({"s": {"narrow": 1000 * first}, "t": {"narrow": second}})
    np.testing.assert_allclose(both, [0.5**0.5] * 2, rtol=1e-6)
    for bad in ({}, {"t": {}}, {"s": {"a": first}, "t": {"b": first}}, {"t": {"a": -first}}):
        with pytest.raises(LibraryError):
            score_cosine.sketch(bad)


@few
@given(scores, scores)
def test_task2vec(one, two) -> None:
    a, b = (task2vec.sketch({"x": v[:3], "y": v[3:]}) for v in (one, two))
    value = task2vec.similarity(a, b)
    assert 0 <= value <= 1
    assert value == pytest.approx(task2vec.similarity(b, a), abs=1e-12)
    assert task2vec.similarity(a, a) == pytest.approx(float(a.any()))
    assert a.sum() == pytest.approx(float(one.any()), rel=1e-5)
    np.testing.assert_allclose(task2vec.sketch({"x": 4 * one[:3], "y": 4 * one[3:]}), a, rtol=1e-5)


def test_task2vec_is_the_papers_symmetric_distance() -> None:
    a, b = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])
    x, y = a / (a + b), b / (a + b)
    wanted = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    found = task2vec.similarity(task2vec.sketch({"g": a}), task2vec.sketch({"g": b}))
    assert found == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(LibraryError):
        task2vec.sketch({"g": -a})


@few
@given(arrays(np.float64, (5, 3), elements=st.floats(-1e3, 1e3)),
       arrays(np.float64, (5, 4), elements=st.floats(-1e3, 1e3)))  # fmt: skip
def test_cka(one, two) -> None:
    a, b = cka.sketch(one), cka.sketch(two)
    value = cka.similarity(a, b)
    assert a.shape == (15,) and 0 <= value <= 1
    assert value == pytest.approx(cka.similarity(b, a), abs=1e-12)
    assert cka.similarity(a, a) == pytest.approx(float(a.any()))


def test_cka_is_the_papers_and_blind_to_rotation_scale_and_mean() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 9))
    x0, y0 = x - x.mean(0), y - y.mean(0)
    wanted = np.linalg.norm(y0.T @ x0) ** 2
    wanted /= np.linalg.norm(x0.T @ x0) * np.linalg.norm(y0.T @ y0)
    assert cka.similarity(cka.sketch(x), cka.sketch(y)) == pytest.approx(wanted, rel=1e-5)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert cka.similarity(cka.sketch(x), cka.sketch(3 * x @ rotation + 2)) == pytest.approx(1.0)
    with pytest.raises(LibraryError, match=r"shape \(15,\), yours \(210,\)"):
        cka.similarity(cka.sketch(x), cka.sketch(x[:5]))
    with pytest.raises(LibraryError):
        cka.sketch(x[:1])


@st.composite
def tasks(draw) -> tuple[np.ndarray, np.ndarray]:
    """Return the parent's probabilities of 5 source classes on n images, and their labels."""
    count = draw(st.integers(1, 9))
    raw = draw(arrays(np.float64, (count, 5), elements=st.sampled_from([0.0, 1e-6, 0.3, 1.0])))
    raw[:, 0] += 1e-3
    labels = draw(arrays(np.int64, count, elements=st.integers(-1, 3)))
    return raw / raw.sum(1, keepdims=True), labels


@few
@given(tasks(), tasks())
def test_leep(one, two) -> None:
    a, b = leep.sketch(*one), leep.sketch(*two)
    assert a.sum() == pytest.approx(1.0, rel=1e-5)
    kept = b.copy()
    assert 0 <= leep.similarity(a, b) <= 1
    np.testing.assert_array_equal(b, kept)
    shuffled = leep.sketch(two[0], 3 - two[1])  # the names of labels mean nothing
    assert leep.similarity(a, shuffled) == pytest.approx(leep.similarity(a, b), rel=1e-4)
    if len(a) == 1:  # one label tells itself
        assert leep.similarity(a, b) == pytest.approx(1.0)


def test_leep_of_nothing_is_no_likeness() -> None:
    own, nothing = leep.sketch(np.eye(4), np.arange(4)), np.zeros((4, 4))
    assert leep.similarity(own, nothing) == leep.similarity(nothing, own) == 0


def test_leep_knows_which_labels_tell_of_which() -> None:
    sure = np.eye(4)
    fine = leep.sketch(sure, np.array([0, 1, 2, 3]))
    coarse = leep.sketch(sure, np.array([0, 0, 1, 1]))
    crossed = leep.sketch(sure, np.array([0, 1, 0, 1]))
    assert leep.similarity(coarse, coarse) == pytest.approx(1.0)
    assert leep.similarity(coarse, fine) == pytest.approx(1.0)
    assert leep.similarity(fine, coarse) == pytest.approx(0.5)  # a guess between two
    assert leep.similarity(coarse, crossed) == pytest.approx(0.5)  # tells nothing of two labels


def test_leep_is_the_papers_where_the_parent_is_sure() -> None:
    rng = np.random.default_rng(0)
    source, labels = rng.integers(0, 3, 50), rng.integers(0, 2, 50)
    own = leep.sketch(np.eye(3)[source], labels)
    every = leep.sketch(np.eye(3), np.arange(3))  # the source labels themselves as a task
    given_source = own / own.sum(0)
    wanted = np.mean([np.log(given_source[y, z]) for y, z in zip(labels, source, strict=True)])
    other = leep.sketch(np.eye(3), np.zeros(3, int))  # tells nothing: the labels' shares remain
    shares = np.bincount(labels) / 50
    prior = np.mean(np.log(shares[labels]))
    assert leep.similarity(own, every) == pytest.approx(1.0)
    assert leep.similarity(own, other) == pytest.approx(np.exp(prior - wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("probabilities", "labels"),
    [(np.eye(3), np.zeros(2)), (np.eye(3) * 2, np.zeros(3)), (np.zeros((0, 3)), np.zeros(0)),
     (np.array([[1.5, -0.5]]), np.zeros(1))],
)  # fmt: skip
def test_leep_refuses_what_is_no_distribution(probabilities, labels) -> None:
    with pytest.raises(LibraryError):
        leep.sketch(probabilities, labels)
    with pytest.raises(LibraryError, match="other source classes"):
        leep.similarity(np.ones((2, 3)), np.ones((2, 4)))
