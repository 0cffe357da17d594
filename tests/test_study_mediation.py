"""Effects along both paths of the causal diagram, on studies with known truths."""

import math
import re

import numpy as np
import pytest
from scipy import stats
from synthetic import TRUTH, again, at, censor, make_study

from soap_jax.study import mediation


def test_a_gain_that_is_only_the_learning_rate_goes_through_it():
    truth = {"sign": 0.4, "bp_scaled": 0.4, "bp_scaled_live": 0.4, "sign_norm": 1.0}
    found = mediation.mediate(make_study(truth, noise=0.02))
    assert found.testable and found.note == ""
    assert found.learning_rate == 0.01
    for order in ("rate first", "direction first", "average", "rate first, fixed at the start"):
        effect = found.effect("rate", order)
        assert effect.share == pytest.approx(1, abs=0.05)
        assert effect.share_low < effect.share < effect.share_high
        assert effect.share_high - effect.share_low < 0.1
        assert found.effect("direction", order).ratio == pytest.approx(1, abs=0.05)


def test_a_gain_that_is_only_the_direction_goes_past_it():
    truth = {"sign": 0.5, "bp_scaled": 1.0, "bp_scaled_live": 1.0, "sign_norm": 0.5}
    found = mediation.mediate(make_study(truth, noise=0.02))
    assert found.effect("direction").share == pytest.approx(1, abs=0.05)
    assert found.effect("rate").share == pytest.approx(0, abs=0.05)


def test_effects_of_an_order_multiply_to_the_total():
    found = mediation.mediate(make_study(TRUTH))
    total = found.effect("total")
    assert (total.share, total.share_low, total.share_high) == pytest.approx((1, 1, 1))
    for order in {effect.order for effect in found.effects} - {"total"}:
        rate, direction = (found.effect(path, order) for path in ("rate", "direction"))
        assert rate.ratio * direction.ratio == pytest.approx(total.ratio)
        assert rate.share + direction.share == pytest.approx(1)
    halves = (found.effect("rate", order).ratio for order in ("rate first", "direction first"))
    assert found.effect("rate").ratio == pytest.approx(math.sqrt(math.prod(halves)))


def test_effects_are_paired_by_seed():
    study = make_study(TRUTH)
    steps = {
        method: study.runs.loc[at(study, method, 0.01), "steps_to_target"].to_numpy()
        for method in ("bp", "sign_norm")
    }
    found = mediation.mediate(study)
    logs = np.log(steps["sign_norm"] / steps["bp"])
    interval = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    effect = found.effect("direction", "direction first")
    assert (effect.ratio, effect.low, effect.high) == pytest.approx(
        tuple(np.exp([logs.mean(), *interval]))
    )
    assert effect.term == "pure natural direct effect"


def test_learning_rates_that_count_are_kept_for_the_diagram():
    found = mediation.mediate(make_study(error_angles=(60.0, 40.0)))
    rates = found.effective_rates
    assert set(rates) == {"bp", "sign", "sign_norm", "bp_scaled", "bp_scaled_live"}
    assert rates["sign"] == pytest.approx((0.092, 0.184))
    assert rates["bp"] == pytest.approx((0.01, 0.02))


def test_without_the_fixed_control_only_its_check_is_missing():
    found = mediation.mediate(make_study(methods=("bp", "sign", "sign_norm", "bp_scaled_live")))
    assert found.testable and len(found.effects) == 7
    with pytest.raises(KeyError, match="no effect along 'rate' in the order 'rate first, fixed"):
        found.effect("rate", "rate first, fixed at the start")


def test_one_row_per_effect():
    found = mediation.mediate(make_study())
    table = mediation.tabulate(found)
    assert len(table) == len(found.effects) == 9
    assert table["ratio"].tolist() == [effect.ratio for effect in found.effects]
    empty = mediation.tabulate(mediation.Mediation(testable=False, note="no"))
    assert empty.empty and empty.columns.tolist() == table.columns.tolist()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"methods": ("bp", "sign", "sign_norm")}, "bp_scaled_live is not in the study"),
        ({"methods": ("sign", "fa")}, "bp is not in the study"),
        ({"optimizer": "adam"}, "the optimizer is adam"),
        ({"init": "soap"}, "start from different weights"),
        ({"seeds": 1}, "there is one seed"),
    ],
)
def test_what_a_study_cannot_tell_it_says(changes, reason):
    found = mediation.mediate(make_study(**changes))
    assert not found.testable and found.effects == ()
    assert re.search(reason, found.note)


def test_without_a_rate_at_which_backprop_arrives_there_is_nothing():
    study = make_study()
    study.runs.loc[study.runs["method"] == "bp", "steps_to_target"] = np.nan
    assert "at no rate" in mediation.mediate(again(study)).note


@pytest.mark.parametrize(
    ("method", "order", "path", "low", "high"),
    [
        ("sign", "total", "total", True, False),
        ("sign", "rate first", "direction", True, False),
        ("sign_norm", "direction first", "rate", False, True),
        ("sign_norm", "direction first", "direction", True, False),
        ("sign_norm", "rate first", "rate", True, True),
        ("bp_scaled_live", "average", "direction", False, True),
        ("bp_scaled_live", "average", "rate", True, False),
    ],
)
def test_a_censored_run_makes_bounds_of_the_effects_that_it_enters(method, order, path, low, high):
    found = mediation.mediate(censor(make_study(), method, 0.01, never=1))
    effect = found.effect(path, order)
    assert (effect.low > 0, effect.high < np.inf) == (low, high)
    assert np.isnan(effect.share) == (not (low and high))
    assert found.note == (
        f"1 of 10 runs of {method} never reached the target; "
        "effects with censored runs are bounds, without shares"
    )


def test_censored_runs_on_both_sides_leave_no_estimate():
    found = mediation.mediate(
        censor(censor(make_study(), "sign", 0.01, never=1), "sign_norm", 0.01, never=1)
    )
    effect = found.effect("rate", "direction first")
    assert math.isnan(effect.ratio)
    assert (effect.low, effect.high) == (0.0, np.inf)
    assert math.isnan(found.effect("rate", "rate first").share)  # of an unknown whole


def test_more_than_a_tenth_censored_is_not_available():
    found = mediation.mediate(censor(make_study(), "sign_norm", 0.01, never=2))
    assert not found.testable
    assert found.note == (
        "more than a tenth of a method's runs are censored: "
        "2 of 10 runs of sign_norm never reached the target"
    )
    check = mediation.mediate(censor(make_study(), "bp_scaled", 0.01, never=2))
    assert check.testable and len(check.effects) == 7
    assert check.note.endswith("so bp_scaled has no effects here")


def test_shares_of_nothing_have_no_interval():
    found = mediation.mediate(make_study({}, seed=3))
    assert found.note == "the total effect is not significant: shares have no interval"
    assert all(math.isnan(effect.share_low) for effect in found.effects)
    assert not math.isnan(found.effect("rate").low)
