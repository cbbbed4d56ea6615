"""The statistics of ratings against independent computations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import fleiss_kappa

from analysis.rating import BY, Agreement, Shares, agreement, bootstrap, mean_shares, shares, sign_test

NAN = math.nan


def votes_of(raters, pairs, seed=0, weights=(0.4, 0.35, 0.25), missing=0.0):
    generator = np.random.default_rng(seed)
    votes = generator.choice([1.0, 0.0, -1.0], size=(raters, pairs), p=weights)
    votes[generator.random((raters, pairs)) < missing] = NAN
    return votes


matrices = (
    st.integers(1, 5)
    .flatmap(
        lambda pairs: st.lists(
            st.lists(st.sampled_from([1.0, 0.0, -1.0, NAN]), min_size=pairs, max_size=pairs), min_size=1, max_size=5
        )
    )
    .map(np.array)
)


@settings(deadline=None)
@given(matrices)
def test_shares_count_every_vote_once(votes):
    given_votes = [vote for row in votes.tolist() for vote in row if not math.isnan(vote)]
    found = shares(votes)
    if not given_votes:
        assert found is None
        return
    expected = [given_votes.count(outcome) / len(given_votes) for outcome in (1, 0, -1)]
    assert [found.first, found.tie, found.second] == pytest.approx(expected)
    assert found.difference == pytest.approx(sum(given_votes) / len(given_votes))


def test_the_mean_weighs_subjects_alike_however_many_votes_they_have():
    many, few = np.ones((4, 8)), np.array([[-1.0], [0.0], [NAN], [NAN]])
    assert mean_shares([many, few]) == Shares(0.5, 0.25, 0.25)
    assert mean_shares([many, np.full((4, 2), NAN)]) is None


# ----------------------------------------------------------------------------------------------------------- bootstrap


def resampled(votes, by, draws=4000, seed=5):
    """The interval of the difference under a plain resampling, one draw at a time."""
    generator = np.random.default_rng(seed)
    raters, pairs = votes.shape
    found = []
    for _ in range(draws):
        rows = generator.integers(0, raters, raters) if "raters" in by else np.arange(raters)
        columns = generator.integers(0, pairs, pairs) if "pairs" in by else np.arange(pairs)
        found.append(np.nanmean(votes[np.ix_(rows, columns)]))
    return np.quantile(found, [0.025, 0.975])


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_intervals_are_those_of_a_plain_resampling(by, missing):
    votes = votes_of(12, 20, missing=missing)
    mean, (alone,) = bootstrap([votes], by)
    assert mean == alone
    assert alone.difference == pytest.approx(resampled(votes, by), abs=0.025)
    low, high = alone.difference
    assert low < shares(votes).difference < high


def test_the_mean_of_subjects_resamples_the_same_raters_in_all():
    # Every rater prefers one method throughout: subjects agree, and to average them over does not narrow the interval.
    votes = np.repeat(np.array([[1.0], [1.0], [-1.0], [0.0], [1.0], [-1.0]]), 5, axis=1)
    mean, each = bootstrap([votes, votes, votes], "raters")
    assert all(mean == of_subject for of_subject in each)
    # Every pair has one better image: subjects are apart, and averaging does narrow it.
    votes = votes.T
    mean, each = bootstrap([votes, votes, votes], "pairs")
    assert np.ptp(mean.difference) < 0.75 * np.ptp(each[0].difference)


def test_one_rater_or_one_pair_cannot_be_resampled():
    none = [None] * 4
    for votes, without in ((votes_of(1, 9), "raters"), (votes_of(9, 1), "pairs")):
        for by in BY:
            mean, each = bootstrap([votes], by)
            for found in (mean, *each):
                ends = [found.first, found.tie, found.second, found.difference]
                assert (ends == none) == (without in by)


def test_no_votes_have_no_intervals():
    mean, (alone,) = bootstrap([np.full((3, 4), NAN)], "raters and pairs")
    assert mean.difference is None and alone.first is None
    mean, _ = bootstrap([np.empty((0, 4))], "raters and pairs")
    assert mean.difference is None


def test_the_same_votes_give_the_same_intervals():
    groups = [votes_of(5, 8, seed) for seed in range(4)]
    assert bootstrap(groups, "raters and pairs") == bootstrap([votes.copy() for votes in groups], "raters and pairs")


# ----------------------------------------------------------------------------------------------------------- sign test


def two_sided(first, second):
    n = first + second
    as_far = [k for k in range(n + 1) if abs(k - n / 2) >= abs(first - n / 2)]
    return sum(math.comb(n, k) for k in as_far) / 2**n


@settings(deadline=None)
@given(matrices)
def test_sign_tests_count_raters_or_pairs(votes):
    for by, lines in (("raters", votes.tolist()), ("pairs", votes.T.tolist())):
        sums = [sum(v for v in line if not math.isnan(v)) for line in lines if not all(map(math.isnan, line))]
        found = sign_test(votes, by)
        first, second = sum(value > 0 for value in sums), sum(value < 0 for value in sums)
        assert (found.first, found.second, found.even) == (first, second, len(sums) - first - second)
        assert found.p is None if not first + second else found.p == pytest.approx(two_sided(first, second))


def test_many_votes_of_few_raters_prove_little():
    votes = np.ones((3, 100))
    assert sign_test(votes, "raters").p == pytest.approx(0.25)
    assert sign_test(votes, "pairs").p < 1e-20


# ----------------------------------------------------------------------------------------------------------- agreement


def krippendorff(votes):
    """Alpha from the coincidence matrix, pair of votes by pair of votes."""
    coincidences = dict.fromkeys(itertools.product((1, 0, -1), repeat=2), 0.0)
    for column in votes.T:
        given_votes = [int(vote) for vote in column if not math.isnan(vote)]
        for one, other in itertools.permutations(given_votes, 2):
            coincidences[one, other] += 1 / (len(given_votes) - 1)
    n = sum(coincidences.values())
    totals = {outcome: sum(coincidences[outcome, other] for other in (1, 0, -1)) for outcome in (1, 0, -1)}
    observed = sum(value for (one, other), value in coincidences.items() if one != other)
    expected = sum(totals[a] * totals[b] for a, b in coincidences if a != b) / (n - 1)
    return None if expected == 0 else 1 - observed / expected


@settings(max_examples=200, deadline=None)
@given(matrices)
def test_alpha_is_krippendorffs(votes):
    found = agreement(votes)
    several = np.isfinite(votes).sum(axis=0) >= 2
    if not several.any():
        assert found is None
        return
    expected = krippendorff(votes)
    assert found.pairs == several.sum()
    if expected is None:
        assert found == Agreement(None, 1.0, found.pairs)
    else:
        assert found.alpha == pytest.approx(expected)


def test_alpha_is_fleiss_kappa_up_to_its_correction_for_small_samples():
    votes = votes_of(15, 32)
    table = np.stack([(votes == outcome).sum(axis=0) for outcome in (1, 0, -1)], axis=1)
    kappa = fleiss_kappa(table, method="fleiss")
    assert 1 - agreement(votes).alpha == pytest.approx((1 - kappa) * (1 - 1 / votes.size))


def test_perfect_agreement_and_none():
    perfect = np.tile([1.0, 0.0, -1.0, 1.0], (6, 1))
    assert agreement(perfect) == Agreement(1.0, 1.0, 4)
    assert agreement(votes_of(200, 60)).alpha == pytest.approx(0, abs=0.01)
    half = np.array([[1.0, 1.0], [-1.0, -1.0]])
    assert agreement(half).observed == 0 and agreement(half).alpha < 0
