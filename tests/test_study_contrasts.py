"""Tests on one's own methods and metrics: differences, shares, and how they are stored."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats
from synthetic import again, at, make_study

from soap_jax.study import claims, contrasts, preset_claims, statistics
from soap_jax.study.contrasts import INF, Difference, FinalAngle, Ratio, Share, Test, Trend


def with_accuracy(seed=0, **means):
    """A study in which methods have these mean test accuracies at their best rate."""
    study = make_study(methods=tuple(means), seed=seed)
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.01, 10)
    for method, mean in means.items():
        accuracy = mean + shared + rng.normal(0, 0.002, 10)
        study.runs.loc[at(study, method, 0.1), "test_accuracy"] = accuracy
    return again(study)


def accuracy(study, method):
    return study.rows("runs", method, 0.1)["test_accuracy"].to_numpy()


# A metric at the end


def test_a_difference_is_paired_and_at_each_methods_best_rate():
    study = with_accuracy(bp=0.95, fa=0.93)
    part = Difference("fa", within=(-0.05, 0.0), metric="test_accuracy").part(study)
    differences = accuracy(study, "fa") - accuracy(study, "bp")
    assert part.estimate == pytest.approx(differences.mean())
    assert part.low < -0.02 < part.high and part.high - part.low < 0.01
    assert part.p_holds < 0.01 and part.measure == "difference"
    assert part.label == (
        "FA, fixed feedback − backprop, test accuracy at the best rates (0.1 and 0.1)"
    )


def test_a_difference_at_a_rate_is_students_t():
    study = with_accuracy(bp=0.95, fa=0.93)
    part = Difference("fa", within=(-INF, 0.0), metric="test_accuracy", at=0.1).part(study)
    interval = stats.ttest_rel(accuracy(study, "fa"), accuracy(study, "bp")).confidence_interval()
    assert (part.low, part.high) == pytest.approx(tuple(interval))
    assert part.label.endswith("test accuracy at rate 0.1")


def test_a_metric_that_a_run_lacks_is_not_tested():
    study = with_accuracy(bp=0.95, fa=0.93)
    study.runs.loc[at(study, "fa", 0.1, seeds=[0]), "test_accuracy"] = np.nan
    part = Difference("fa", within=(-1, 0), metric="test_accuracy").part(again(study))
    assert not part.testable and "test_accuracy of fa or bp is not known for every" in part.note
    share = Share("fa", over="bp", metric="test_accuracy", within=(0, 1)).part(again(study))
    assert not share.testable and share.note == "test_accuracy is not known for every run"


# Shares of a gain


def test_a_share_is_that_of_the_gain_over_the_control():
    study = with_accuracy(bp=0.95, fa=0.92, frozen=0.90)
    test = Share("fa", "bp", over="frozen", metric="test_accuracy", within=(0.2, 0.6))
    part = test.part(study)
    fa, bp, frozen = (accuracy(study, method) for method in ("fa", "bp", "frozen"))
    assert part.estimate == pytest.approx((fa - frozen).mean() / (bp - frozen).mean())
    found = statistics.fieller(fa - frozen, bp - frozen)
    assert (part.low, part.high) == found.interval
    assert part.low < 0.4 < part.high and part.p_holds < 0.05
    assert part.runs == 30 and "at the best rates (0.1, 0.1 and 0.1)" in part.label
    assert dataclasses.replace(test, within=(0.9, INF)).part(study).p_fails < 0.001


def test_a_share_of_a_loss_is_the_same_and_a_loss_that_grows_is_no_gain():
    """Where less is better both gains are negative."""
    study = with_accuracy(bp=0.95, fa=0.92, frozen=0.90)
    share = Share("fa", over="frozen", metric="test_accuracy", within=(0.2, 0.6))
    found = share.part(study)
    study.runs["test_loss"] = -study.runs["test_accuracy"]
    of_loss = dataclasses.replace(share, metric="test_loss")
    assert of_loss.part(again(study)).estimate == pytest.approx(found.estimate)
    study.runs["test_loss"] *= -1
    assert "is not significant" in of_loss.part(again(study)).note


def test_a_share_of_no_clear_gain_is_not_testable():
    study = with_accuracy(bp=0.9, fa=0.92, frozen=0.9)
    part = Share("fa", over="frozen", metric="test_accuracy", within=(0.2, 0.6)).part(study)
    assert not part.testable and "gain of the reference over the control is not" in part.note


@pytest.mark.parametrize("truth", [0.9, 0.5])
def test_shares_are_wrongly_said_to_be_beyond_a_bound_no_more_often_than_they_may(truth):
    """The bound is at the truth: any conclusion about it is wrong."""
    rng = np.random.default_rng(0)
    wrong = []
    for _ in range(1500):
        whole = rng.normal(1.0, 0.3, 10)
        part = truth * whole + rng.normal(0, 0.1, 10)
        result = statistics.fieller(part, whole).judge((truth, INF))
        wrong.append(min(result.p_holds, result.p_fails) < 0.05)
    assert np.mean(wrong) < 0.065


# Edges


@pytest.mark.parametrize(
    "test",
    [
        Difference("fa", within=(-1, 0), metric="test_accuracy"),
        Share("fa", over="bp", metric="test_accuracy", within=(0, 1)),
        Ratio("fa", within=(1, 2), at="best"),
        FinalAngle("fa", within=(0, 75)),
    ],
)
def test_a_best_rate_at_the_edge_is_not_testable(test):
    part = test.part(make_study(rates=(0.1, 1.0)))
    assert not part.testable and "lies at the edge of the grid" in part.note
    assert part.label == test.label(make_study())
    assert part.label.endswith(("test accuracy", "steps to loss 0.5", "last hidden layer"))


@pytest.mark.parametrize(("seeds", "open_"), [(2, True), (3, True), (6, False)])
def test_too_few_seeds_for_an_interval_at_best_rates_say_so(seeds, open_):
    """With 3 seeds every ninth resample holds one seed alone, and has no standard error."""
    study = make_study(seeds=seeds)
    part = Ratio("fa", within=(1, 2), at="best").part(study)
    assert np.isinf(part.high) == open_
    assert ("too few seeds for an interval at best rates: use more" in part.note) == open_


# Stored


@pytest.mark.parametrize(
    "test",
    [
        *(test for claim in preset_claims.CLAIMS for test in claim.tests),
        Ratio("mine", "bp", within=(0, 0.95), at=0.1),
        Difference("mine", metric="test_f1", within=(-0.01, 0.01), periods=(10, None)),
        Share("mine", over="frozen", metric="test_f1", within=(0.5, INF)),
    ],
)
def test_a_test_comes_back_from_json_as_it_was(test):
    stored = json.loads(json.dumps(test.to_dict(), allow_nan=False))
    assert Test.from_dict(stored) == test
    assert Test.from_dict(stored).to_dict() == test.to_dict() == stored


def test_claims_come_back_from_json_and_are_not_exploratory():
    study = make_study()
    stored = json.loads(json.dumps([claim.to_dict() for claim in preset_claims.CLAIMS]))
    assert tuple(map(claims.Claim.from_dict, stored)) == preset_claims.CLAIMS
    study.record["claims"] = stored
    assert not any(finding.exploratory for finding in study.judge(preset_claims.CLAIMS))


def test_other_bounds_than_the_stored_ones_are_exploratory():
    study = make_study()
    study.record["claims"] = [
        claim.to_dict() for claim in claims.as_claims([Ratio("fa", within=(1.5, 3))])
    ]
    (same,) = study.judge([Ratio("fa", within=(1.5, 3.0))])
    other, third = study.judge([Ratio("fa", within=(1.5, 2.5)), Ratio("sign", within=(0, 0.8))])
    assert (same.exploratory, other.exploratory, third.exploratory) == (False, True, True)
    assert same.statement == "FA, fixed feedback / backprop, steps to loss 0.5 at rate 0.01"
    assert same.p == pytest.approx(same.parts[0].p_holds)  # a family of one
    assert third.p_words.endswith("corrected for 3 claims (Holm)")  # and not of two


def test_an_unknown_test_is_refused():
    with pytest.raises(ValueError, match="test: 'Ratios' is unknown; expected Ratio, Difference"):
        Test.from_dict({"test": "Ratios", "within": [0, 1]})


@dataclasses.dataclass(frozen=True)
class Faster(Test):
    """A test of one's own: the share of seeds with fewer steps."""

    method: str
    measure = "share"

    def label(self, comparison):
        return f"{comparison.label(self.method)}: seeds in which it is faster"

    def evaluate(self, comparison):
        i = comparison.rates.index(comparison.rate(self.method, "shared"))
        won = comparison.grid(self.method).values[i] < comparison.grid("bp").values[i]
        found = statistics.student(won).judge(self.within)
        return self.with_result(comparison, "at the shared rate", found, len(won))


def test_a_test_of_ones_own_is_judged_and_stored_as_the_others():
    study = make_study()
    (finding,) = study.judge([Faster("sign", within=(0.5, INF))])
    assert finding.statement.startswith("sign sync, raw: seeds in which it is faster at the shared")
    assert finding.parts[0].estimate == 1.0 and finding.exploratory
    assert Test.from_dict(finding_test := Faster("sign", within=(0.5, INF)).to_dict()).method
    assert finding_test["within"] == [0.5, None]
    del contrasts.Test.kinds["Faster"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ratio("fa", within=(3, 1)),
        lambda: Ratio("fa", within=(-1, 1)),
        lambda: Trend(("bp", "fa"), within=(0.0, math.nan)),
    ],
)
def test_regions_that_are_none_are_refused(make):
    with pytest.raises(ValueError, match=r"within is .*; expected \(low, high\)"):
        make()


# In words


@pytest.mark.parametrize(
    ("within", "numbers", "said"),
    [
        ((1.5, 3), (1.8, 1.7, 1.9, 0.001, 1), ("1.5 to 3", "lies within 1.5 to 3")),
        ((0, 0.8), (0.5, 0.4, 0.6, 0.001, 1), ("below 0.8", "lies below 0.8")),
        ((0.9, INF), (1.0, 0.95, 1.1, 0.001, 1), ("above 0.9", "lies above 0.9")),
        ((1.5, 3), (1.8, 1.4, 1.9, 0.1, 1), ("1.5 to 3", "contains 1.5")),
        ((1.5, 3), (1.8, 1.4, INF, 1, 1), ("1.5 to 3", "contains 1.5 and 3")),
        ((1.5, 3), (1.2, 1.1, 1.3, 1, 0.001), ("1.5 to 3", "lies below 1.5")),
        ((0, 1), (1.2, 1.1, INF, 1, 0.001), ("below 1", "lies above 1")),
    ],
)
def test_where_an_interval_lies(within, numbers, said):
    words = claims.format_part(contrasts.Part("", "ratio", within, *numbers))
    assert (words.bound, words.position) == (said[0], f"the interval {said[1]}")


def test_what_has_no_interval_in_words():
    open_ = claims.format_part(contrasts.Part("", "ratio", (0.9, 1.1), 1.0, 0.0, INF, 1, 1))
    assert open_ == ("1.00", "0.9 to 1.1", "no interval")
    untested = claims.format_part(contrasts.Part("", "trend", (0, INF), testable=False))
    assert untested == ("–", "rises", "not testable")
    trend = claims.format_part(
        contrasts.Part("", "trend", (0, INF), 0.9, math.nan, math.nan, 0.001, 1)
    )
    assert trend == ("rank correlation 0.900", "rises", "it rises")
    alike = claims.format_part(contrasts.Part("", "ratio", (0.9, 1.1), 1.0, 1.0, 1.0, 0.25, 1))
    assert alike.position == "all runs agree, but they are too few for a conclusion"
    none = claims.format_part(contrasts.Part("", "degrees", (-INF, 75.0), testable=False))
    assert none == ("–", "below 75", "not testable")
    angle = claims.format_part(
        contrasts.Part("", "degrees", (-INF, 75.0), 62.2, 61.0, 63.4, 0.001, 1)
    )
    assert angle.estimate == "62.2° [61.0, 63.4]"
