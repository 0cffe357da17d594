"""Verdicts on studies with known truths, and what each claim needs to be tested at all."""

import dataclasses
import math
import re

import numpy as np
import pytest
from synthetic import TRUTH, TUNED, again, at, censor, make_study

from soap_jax.study import Difference, Ratio, claims, preset_claims

HOLDS, FAILS, UNDECIDED, NOT_TESTABLE = "holds", "fails", "undecided", "not testable here"


def find(study, key):
    """One claim's finding on a study."""
    return next(finding for finding in study.judge() if finding.key == key)


def verdicts(study):
    return {finding.key: finding.verdict for finding in study.judge()}


def test_a_note_that_ends_with_a_full_stop_gets_no_second_one():
    single = Difference("fa", within=(-1, 0), metric="test_f1")
    (finding,) = make_study().judge([single])
    assert finding.why[-1] == "." and ".." not in finding.why


def test_a_finding_in_two_lines():
    study = make_study(noise=0.02)
    single = Difference("fa", within=(-1, 0), metric="test_f1")
    found, untested = study.judge([Ratio("fa", within=(1.5, 3)), single])
    title, numbers = str(found).split("\n")
    assert title == (
        "FA, fixed feedback / backprop, steps to loss 0.5 at rate 0.01: holds, p < 0.001, "
        "exploratory"
    )
    assert numbers.startswith("  1.97 [1.93, 2.02], the") and numbers.endswith(
        "the interval lies within 1.5 to 3."
    )
    assert str(untested).startswith(
        "FA, fixed feedback − backprop, test f1: not testable here, exploratory\n  Metric is"
    )
    assert "parts" not in repr(found)
    (small,) = study.judge([Ratio("sign", within=(0, 0.9))])
    assert str(small).count("sign sync") + str(small).count("Sign sync") == 1


# Known truths


def test_what_the_pilot_showed_holds():
    study = make_study(error_angles=(70.0, 60.0, 40.0), noise=0.03)
    assert set(verdicts(study).values()) == {HOLDS}


def test_a_true_factor_of_two_is_found():
    part = find(make_study(noise=0.02), "1").parts[0]
    assert part.low < 2 < part.high
    assert (part.measure, part.within, part.censored, part.runs) == ("ratio", (1.5, 3.0), 0, 20)
    assert part.label == "FA, fixed feedback / backprop, steps to loss 0.5 at rate 0.01"


def test_a_true_null_fails():
    """All methods are as fast as backprop."""
    assert verdicts(make_study({}, tuned={}, noise=0.02)) == {
        "1": FAILS,
        "2": FAILS,
        "3": HOLDS,  # there is no gain to explain
        "4": UNDECIDED,  # nor an order of steps
        "5": UNDECIDED,  # sign is at the bound
        "6": HOLDS,
        "7": HOLDS,
        "7b": NOT_TESTABLE,
    }


def test_a_gain_that_is_only_the_learning_rate_is_told_from_one_that_is_not():
    confounded = {"sign": 0.4, "bp_scaled_live": 0.4, "sign_norm": 1.0}
    confounded = verdicts(make_study(confounded, noise=0.02))
    assert (confounded["2"], confounded["3"]) == (HOLDS, HOLDS)
    finding = find(make_study({**TRUTH, "sign_norm": 0.5, "bp_scaled_live": 1.0}), "3")
    assert finding.verdict == FAILS
    assert finding.why.count("the interval lies below 0.9") == 2


def test_one_part_is_enough_to_fail():
    finding = find(make_study({**TRUTH, "bp_scaled_live": 1.0}), "3")
    assert finding.verdict == FAILS
    assert "norm kept" not in finding.why  # that part is as claimed


def test_near_a_bound_nothing_is_decided():
    finding = find(make_study({**TRUTH, "fa": 1.52}), "1")
    assert finding.verdict == UNDECIDED
    assert "the interval contains 1.5" in finding.why
    assert 0.05 < finding.p <= 1


def test_what_the_correction_costs_is_said():
    finding = find(make_study({**TRUTH, "fa": 1.6}, seed=14), "1")  # a seed where it costs
    assert finding.parts[0].p_holds < 0.05 < finding.p
    assert finding.verdict == UNDECIDED
    assert finding.why.startswith("Not significant after Holm's correction for 7 claims: FA, fixed")
    assert "the interval lies within 1.5 to 3" in finding.why
    assert finding.p_words.endswith("for “holds”, corrected for 7 claims (Holm)")


def test_steps_out_of_order_fail_the_trend():
    study = make_study({"fa": 0.5, "sign_preserve": 1.0, "sign_norm": 1.5}, noise=0.02)
    part = find(study, "4").parts[1]
    assert part.p_fails < 0.001 and part.p_holds == 1.0
    assert part.estimate < -0.5 and math.isnan(part.low)
    part = find(make_study(), "4").parts[1]
    assert part.p_holds < 0.001
    assert part.note == "angles of feedback to weights at the start: 0, 37.1, 50.5, 90 degrees"


def test_the_amplification_that_counts_is_said_beside_the_third_claim():
    note = find(make_study(), "3").parts[0].note
    assert note == (
        "effective rates of the hidden layers (norm ratio × cosine) start at 9.2 times the rate"
    )


def test_tuned_rates_are_each_methods_own():
    study = make_study(rates=(0.01, 0.03, 0.1, 0.3, 1.0), noise=0.02)
    better = at(study, "sign", 0.03)
    study.runs.loc[better, "validation_accuracy"] += 0.2
    study.runs.loc[better, "steps_to_target"] *= 0.1
    part = find(again(study), "5").parts[1]
    assert part.label.endswith("at the best rates (0.03 and 0.1)")
    assert part.estimate < 0.2


def test_periods_are_compared_with_the_first():
    truth = {**TRUTH, ("sign_preserve", 100): TRUTH["sign_preserve"] * 1.5}
    finding = find(make_study(truth, noise=0.02), "6")
    assert [part.p_holds < 0.05 for part in finding.parts] == [True, True, True, False]
    assert finding.verdict == FAILS
    assert "T = 100 / sign sync, |B0| kept, T = 1" in finding.parts[3].label


@pytest.mark.parametrize(("angle", "verdict"), [(60, HOLDS), (75, UNDECIDED), (89, FAILS)])
def test_alignment_is_judged_at_the_layer_nearest_the_output(angle, verdict):
    finding = find(make_study(error_angles=(10.0, angle)), "7")
    assert finding.verdict == verdict
    assert finding.parts[0].estimate == pytest.approx(angle, abs=3)
    assert finding.parts[0].measure == "degrees"


def test_alignment_by_depth():
    near = find(make_study(error_angles=(80.0, 60.0, 40.0)), "7b")
    assert near.verdict == HOLDS
    assert near.parts[0].note.startswith("from the output to the input: 3")
    assert find(make_study(error_angles=(40.0, 60.0, 80.0)), "7b").verdict == FAILS
    assert find(make_study(error_angles=(60.0, 60.0, 60.0)), "7b").verdict == UNDECIDED


# Censoring


def test_a_run_that_never_arrives_leaves_a_bound():
    study = censor(make_study(noise=0.02), "fa", 0.01, never=1)
    part = find(study, "1").parts[0]
    assert part.censored == 1
    assert part.high == np.inf and part.low > 1.5
    assert part.p_holds == 1.0
    assert part.note == "a lower bound: 1 of 10 runs of fa never reached the target"


def test_a_bound_decides_on_its_own_side():
    slow = {**TRUTH, "sign": 1.2, "fa": 5.0}
    study = censor(make_study(slow), "sign", 0.01, never=1)
    assert find(study, "2").verdict == FAILS  # sign is too slow, however slow
    assert find(study, "3").parts[0].p_holds < 0.05  # and not faster than the control
    assert find(censor(study, "fa", 0.01, never=1), "1").verdict == FAILS
    fast = censor(make_study(), "sign", 0.01, never=1)
    assert find(fast, "2").verdict == UNDECIDED  # its other runs are fast, but the bound is open
    control = censor(make_study({**TRUTH, "bp_scaled_live": 1.0}), "bp_scaled_live", 0.01, never=1)
    part = find(control, "3").parts[0]
    assert part.note.startswith("an upper bound: 1 of 10 runs of bp_scaled_live never reached")
    assert part.low == 0.0 and part.p_fails < 0.05


def test_bounds_on_both_sides_say_nothing():
    study = censor(make_study(), "sign", 0.01, diverged=1)
    part = find(censor(study, "bp_scaled_live", 0.01, never=1), "3").parts[0]
    assert (part.low, part.high, part.p_holds, part.p_fails) == (0.0, np.inf, 1.0, 1.0)
    assert math.isnan(part.estimate)
    assert "at rate 0.01: –, no interval" in find(study, "3").why
    assert part.note.startswith(
        "neither a lower nor an upper bound: 1 of 10 runs of sign diverged; "
        "1 of 10 runs of bp_scaled_live never reached the target; effective rates"
    )


def test_more_than_a_tenth_censored_is_undecided():
    study = censor(make_study({**TRUTH, "fa": 20.0}), "fa", 0.01, never=1, diverged=1)
    finding = find(study, "1")
    assert finding.verdict == UNDECIDED
    assert finding.parts[0].note == (
        "more than a tenth of a method's runs are censored, so there is no conclusion: "
        "2 of 10 runs of fa never reached the target (1 of them diverged)"
    )
    assert finding.parts[0].note in finding.why
    trend = find(study, "4").parts[1]
    assert (trend.p_holds, trend.p_fails, trend.censored, trend.runs) == (1.0, 1.0, 2, 40)
    assert trend.note.startswith("more than a tenth of a method's runs")


def test_a_censored_run_in_a_trend_counts_as_the_slowest():
    part = find(censor(make_study(), "fa", 0.01, never=1), "4").parts[1]
    assert part.p_holds < 0.001 and part.censored == 1
    assert part.note.startswith("1 of 10 runs of fa never reached the target; angles")


def test_a_censored_run_at_a_tuned_rate():
    study = censor(make_study(), "fa", 0.1, never=1)
    part = find(study, "5").parts[0]
    assert part.high == np.inf and part.censored == 1
    assert part.note == "a lower bound: 1 of 10 runs of fa never reached the target"


def test_a_censored_run_at_a_rate_that_only_resamples_choose():
    study = make_study(rates=(0.01, 0.03, 0.1, 0.3, 1.0), accuracy_noise=0.01)
    rows = at(study, "fa", 0.03)
    study.runs.loc[rows, "validation_accuracy"] += 0.0999
    best = study.runs.loc[at(study, "fa", 0.1), "validation_accuracy"].mean()
    other = study.runs.loc[rows, "validation_accuracy"].mean()
    study.runs.loc[rows, "validation_accuracy"] += best - other - 0.001
    part = find(censor(again(study), "fa", 0.03, never=1), "5").parts[0]
    assert (part.censored, part.high) == (0, np.inf)
    assert part.note == ("a lower bound: there are censored runs at rates that the bootstrap chose")


# What cannot be tested


@pytest.mark.parametrize(
    ("changes", "keys", "reason"),
    [
        (
            {"optimizer": "adam"},
            ["1", "4", "5", "6", "7", "7b"],
            "the optimizer is adam, and the cla",
        ),
        ({"seeds": 1}, ["1", "5", "7"], "there is one seed; at least 2"),
        ({"methods": ("bp", "sign")}, ["1", "5", "7"], "fa is not in the study"),
        ({"methods": ("fa", "sign")}, ["1", "2"], "bp is not in the study"),
        ({"periods": (1, 10)}, ["6"], "sign with period 100 is not in the study"),
        ({"periods": (10, 100)}, ["6"], "sign with period 1 is not in the study"),
        (
            {"target_loss": 0.3},
            ["1", "2", "3", "4", "6"],
            "at no rate of the grid do all runs of backprop reach",
        ),
        ({"rates": (0.1,)}, ["5"], "best rates need a grid of at least 2"),
        ({"rates": (0.1, 1.0)}, ["5"], "the best rate of fa, 1, lies at the edge of the grid"),
        ({}, ["7b"], "needs at least 3; the network has 1"),
    ],
)
def test_what_a_study_cannot_test_it_says(changes, keys, reason):
    angles = (60.0, 50.0, 40.0) if "optimizer" in changes else (40.0,)
    study = make_study(error_angles=angles, **changes)
    if "target_loss" in changes:
        study.runs.loc[study.runs["method"] == "bp", "steps_to_target"] = np.nan
        study = again(study)
    for finding in (find(study, key) for key in keys):
        assert finding.verdict == NOT_TESTABLE
        assert math.isnan(finding.p)
        part = next(part for part in finding.parts if not part.testable)
        assert re.search(reason, part.note)
        assert finding.why.lower().startswith(part.note.lower()[:20])
        assert math.isnan(part.estimate) and part.label and part.within


def test_ratios_of_methods_that_start_from_different_weights_say_so_and_explain_nothing():
    findings = {f.key: f for f in make_study(init="soap").judge()}
    for key in ("1", "2", "3", "4", "5"):
        assert "start from different weights" in findings[key].parts[0].note
        assert (findings[key].verdict == NOT_TESTABLE) == (key in "345")
    assert all("different weights" not in part.note for part in findings["6"].parts)
    assert findings["7"].verdict == HOLDS


def test_periods_longer_than_any_run_are_pointed_out():
    study = make_study()
    study.runs.loc[study.runs["method"] == "sign", "steps_to_target"] = 50.0
    notes = [part.note for part in find(again(study), "6").parts]
    assert [("synced only at the start" in note) for note in notes] == [False, True, False, False]


def test_a_method_that_diverges_everywhere_has_no_best_rate():
    study = make_study()
    study.runs.loc[study.runs["method"] == "fa", "diverged"] = True
    assert "some run of fa diverged at every rate" in find(study, "7").parts[0].note


def test_an_angle_that_is_not_known_is_not_tested():
    study = make_study()
    study.evaluations["error_angle/Dense_0/kernel"] = np.nan
    assert "not known for every seed" in find(again(study), "7").parts[0].note


@pytest.mark.parametrize("config", [{}, {"methods": ("bp", "fa"), "periods": (1,)}])
def test_the_correction_counts_what_is_testable(config):
    """The smallest p-value is multiplied by the number of claims that are tested."""
    findings = [f for f in make_study(**config).judge() if f.verdict != NOT_TESTABLE]
    smallest = min(findings, key=lambda finding: finding.p)
    raw = max(part.p_holds for part in smallest.parts)
    assert len(findings) == (2 if config else 7)
    assert smallest.p == pytest.approx(len(findings) * raw)


# The whole


def test_the_verdict_on_a_stored_claim_does_not_depend_on_who_asks():
    study = make_study()
    everything = study.judge()
    assert [finding.key for finding in everything] == ["1", "2", "3", "4", "5", "6", "7", "7b"]
    first, last = preset_claims.CLAIMS[0], preset_claims.CLAIMS[6]
    # As text, since a p-value may be NaN.
    assert repr(study.judge([last, first])) == repr([everything[6], everything[0]])
    assert study.judge([]) == []
    assert repr(study.judge()) == repr(everything)  # repeats exactly
    assert not any(finding.exploratory for finding in everything)


def test_one_row_per_part():
    findings = make_study().judge()
    table = claims.tabulate(findings)
    assert table["claim"].tolist() == [f.key for f in findings for _ in f.parts]
    row = table.iloc[0]
    part = findings[0].parts[0]
    assert (row["within_low"], row["within_high"]) == part.within
    for field in dataclasses.fields(part):
        if field.name != "within":
            assert row[field.name] == getattr(part, field.name)
    assert row["verdict"] == findings[0].verdict and row["p"] == findings[0].p
    assert not table.iloc[-1]["testable"]


def test_declarations_say_what_the_protocol_says():
    bounds = {c.key: [test.within for test in c.tests] for c in preset_claims.CLAIMS}
    inf = math.inf
    assert bounds == {
        "1": [(1.5, 3.0)],
        "2": [(0.0, 0.8)],
        "3": [(0.9, inf), (0.9, inf)],
        "4": [(0.95, inf), (0.0, inf)],
        "5": [(1 / 1.25, 1.25), (0.0, 1.0), (1 / 1.1, 1.1)],
        "6": [(1 / 1.1, 1.1)] * 4,
        "7": [(-inf, 75.0)],
        "7b": [(0.0, inf)],
    }
    assert [test.at for test in preset_claims.CLAIMS[4].tests] == ["best"] * 3
    assert all(claim.sgd_only for claim in preset_claims.CLAIMS)


AT_THE_BOUNDS = {"fa": 1.5, "sign": 0.8, "bp_scaled_live": 0.8 / 0.9, "sign_preserve": 0.95}
AT_THE_BOUNDS |= {(m, t): AT_THE_BOUNDS[m] * 1.1 for m in ("sign", "sign_preserve") for t in (10,)}
TUNED_AT_THE_BOUNDS = TUNED | {"fa": 1.25, "sign": 0.9, "bp_scaled_live": 0.9 / 1.1}


def holds_at_the_bounds(studies):
    """How often any claim is said to hold with all truths at the bounds."""
    found = 0
    for seed in range(studies):
        study = make_study(
            AT_THE_BOUNDS, tuned=TUNED_AT_THE_BOUNDS, error_angles=(75.0,), seed=seed, noise=0.03
        )
        found += HOLDS in verdicts(study).values()
    return found / studies


def test_nothing_holds_at_the_bounds():
    assert holds_at_the_bounds(10) <= 0.2  # 3 of 10 would have P = 0.01


@pytest.mark.slow
def test_false_verdicts_of_the_whole_family_are_rare():
    assert holds_at_the_bounds(1000) < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 1000)
