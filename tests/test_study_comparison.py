"""What tables say, against tables worked out by hand."""

import json
import math

import made_up
import numpy as np
import pandas as pd
import pytest
from synthetic import again, at, make_study

from soap_jax.study import comparison, contrasts
from soap_jax.study.comparison import Comparison
from soap_jax.study.results import NotTestable
from soap_jax.study.store import KEYS, TABLES

NAN = np.nan
RUNS = [  # method, rate, seed, steps, validation accuracy, diverged
    ("bp", 0.01, 0, NAN, 0.50, False),
    ("bp", 0.01, 1, 90, 0.52, False),
    ("bp", 0.1, 0, 20, 0.90, False),
    ("bp", 0.1, 1, 40, 0.92, False),
    ("bp", 1.0, 0, 5, 0.80, False),
    ("bp", 1.0, 1, 5, 0.80, False),
    ("fa", 0.01, 0, NAN, 0.30, False),
    ("fa", 0.01, 1, NAN, 0.30, False),
    ("fa", 0.1, 0, 40, 0.80, False),
    ("fa", 0.1, 1, 80, 0.82, False),
    ("fa", 1.0, 0, 10, 0.99, False),
    ("fa", 1.0, 1, NAN, NAN, True),
]


def by_hand(rows=RUNS, *, periods=None, **changes):
    """A comparison of these runs, at each of the periods of a method; half the steps are 50."""
    periods = periods or {}
    columns = ["method", "learning_rate", "seed", "steps_to_target", "validation_accuracy"]
    runs = pd.DataFrame(rows, columns=[*columns, "diverged"]).assign(steps=100, train_loss=0.5)
    tables = [
        of_method.assign(period=period)
        for method, of_method in runs.groupby("method", sort=False)
        for period in periods.get(method, (0,))
    ]
    runs = pd.concat(tables, ignore_index=True)
    runs["validation_loss"] = 1 - runs["validation_accuracy"]
    runs["test_accuracy"] = runs["validation_accuracy"] - 0.01
    methods, rates = dict.fromkeys(runs["method"]), sorted(set(runs["learning_rate"]))
    seeds = runs["seed"].nunique()
    record = made_up.make_record(tuple(methods), rates=tuple(rates), seeds=seeds, **changes)
    record["protocol"]["steps"] = 100
    for method in methods:
        record["methods"][method]["periods"] = list(periods.get(method, (0,)))
    losses = runs[KEYS].assign(train_loss=[[]] * len(runs))
    return Comparison(record, {"runs": runs, "evaluations": runs[KEYS], "losses": losses})


def changed(method, rate, **values):
    """The runs with other values at a method's rate: of all its seeds, or of a list each."""
    columns = ["method", "learning_rate", "seed", "steps_to_target", "validation_accuracy"]
    table = pd.DataFrame(RUNS, columns=[*columns, "diverged"])
    for name, value in values.items():
        table.loc[(table["method"] == method) & (table["learning_rate"] == rate), name] = value
    return list(table.itertuples(index=False, name=None))


# Rates


def test_the_best_rate_is_chosen_on_validation_data_where_no_run_diverged():
    made = by_hand()
    assert made.best_rate("bp") == made.best_rate("fa") == 0.1
    broken = by_hand([(*row[:5], True) for row in RUNS])
    assert math.isnan(broken.best_rate("bp"))
    with pytest.raises(NotTestable, match="some run of bp diverged at every rate"):
        broken.rate("bp", "best")


def test_ties_go_to_the_lower_validation_loss():
    runs = changed("bp", 1.0, validation_accuracy=[0.92 + 1e-8, 0.90])
    made = by_hand(runs)
    made.runs.loc[at(made, "bp", 1.0), "validation_loss"] = 0.01
    assert again(made).best_rate("bp") == 1.0
    made.runs.loc[at(made, "bp", 1.0), "validation_loss"] = 0.5
    assert again(made).best_rate("bp") == 0.1


def test_rates_can_be_chosen_by_a_loss_which_is_then_minimised():
    made = by_hand(metric=None)
    assert made.protocol["select"] == "validation_loss"
    assert made.best_rate("bp") == 0.1
    made.record["protocol"]["select"] = "train_loss"
    made.runs.loc[at(made, "bp", 0.01), "train_loss"] = 0.1
    assert again(made).best_rate("bp") == 0.01


def test_the_shared_rate_is_the_smallest_at_which_all_of_the_reference_arrive_in_half_the_steps():
    assert by_hand().shared_rate == 0.1
    assert by_hand(changed("bp", 0.1, steps_to_target=[20, 50])).shared_rate == 0.1
    assert by_hand(changed("bp", 0.1, steps_to_target=[20, 51])).shared_rate == 1.0
    assert by_hand(changed("bp", 0.1, diverged=True)).shared_rate == 1.0
    assert by_hand(changed("fa", 0.1, steps_to_target=NAN)).shared_rate == 0.1
    never = by_hand([(*row[:3], NAN, *row[4:]) for row in RUNS])
    assert math.isnan(never.shared_rate)
    assert "at no rate of the grid do all runs of backprop reach loss 0.5" in never.why


def test_added_rates_are_never_shared():
    made = by_hand()
    made.record["protocol"]["learning_rates"], made.record["extended"] = [0.01, 1.0], [0.1]
    assert again(made).shared_rate == 1.0
    assert again(made).best_rate("bp") == 0.1


def test_without_the_reference_every_method_has_a_say():
    rows = [("sign" if row[0] == "bp" else row[0], *row[1:]) for row in RUNS]
    made = by_hand(rows)
    assert made.reference is None
    assert math.isnan(made.shared_rate)  # a run of fa takes 80 steps
    assert by_hand([row for row in rows if row[0] == "sign"]).shared_rate == 0.1


def test_the_reference_is_what_the_methods_name():
    made = by_hand()
    for method in made.methods.values():
        method["reference"] = "fa"
    other = again(made)
    assert other.reference == "fa"
    row = other.summary().set_index("method").loc["bp"]
    assert math.isnan(row["shared_rate"])


# The target loss


def test_without_a_target_it_is_what_every_seed_of_the_reference_reaches_in_an_eighth():
    made = made_up.comparison(("bp", "fa"), target_loss=None, seeds=3)
    losses = np.stack(made.rows("losses", "bp", made.best_rate("bp"))["train_loss"])
    from soap_jax.study.statistics import smooth, steps_to_loss

    reached = smooth(losses)[:, : 340 // 8].min(axis=1)
    assert made.target_loss == pytest.approx(reached.max())
    fa = made.rows("runs", "fa", 0.2)["steps_to_target"].to_numpy()
    losses = np.stack(made.rows("losses", "fa", 0.2)["train_loss"])
    np.testing.assert_array_equal(fa, steps_to_loss(losses, made.target_loss))
    assert np.isfinite(fa).all() and not made.exploratory


def test_added_rates_do_not_move_the_target():
    made = made_up.comparison(("bp", "fa"), target_loss=None, seeds=3)
    best, rates = made.best_rate("bp"), list(made.rates)
    made.record["extended"] = [best]
    made.record["protocol"]["learning_rates"] = [rate for rate in rates if rate != best]
    other = again(made)
    without = made_up.comparison(
        ("bp", "fa"), target_loss=None, seeds=3, rates=[rate for rate in rates if rate != best]
    )
    assert other.best_rate("bp") == best
    assert other.target_loss == without.target_loss != made.target_loss


def test_a_target_near_the_start_is_none():
    made = made_up.comparison(("bp",), target_loss=None, seeds=2, rates=(0.001, 0.002))
    assert math.isnan(made.target_loss) and math.isnan(made.shared_rate)
    assert "does not reach 0.9 of its initial loss" in made.why
    with pytest.raises(NotTestable, match=r"does not reach 0\.9"):
        made.ratio("bp", "bp")
    assert made.summary()["steps_to_target"].isna().all()


def test_steps_can_be_counted_to_another_loss_which_is_exploratory():
    made = made_up.comparison(("bp", "fa"), seeds=3)
    other = made.at_target(1.0)
    for loss in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"target_loss is .*; expected a positive number"):
            made.at_target(loss)
    assert other.exploratory and not made.exploratory and not made.at_target(0.5).exploratory
    assert other.target_loss == 1.0 and made.target_loss == 0.5
    faster = other.rows("runs", "bp", 0.1)["steps_to_target"].to_numpy()
    assert (faster < made.rows("runs", "bp", 0.1)["steps_to_target"].to_numpy()).all()
    test = contrasts.Ratio("fa", within=(1.0, 3.0))
    assert other.judge([test])[0].exploratory


# Ratios


def test_a_ratio_at_the_shared_rate_at_another_and_at_best_ones():
    made = by_hand()
    assert made.ratio("fa", "bp").value == pytest.approx(2.0)
    assert (made.ratio("fa", "bp").low, made.ratio("fa", "bp").high) == pytest.approx((2, 2))
    assert made.ratio("fa", "bp", at="best").value == pytest.approx(2.0)
    late = made.ratio("fa", "bp", at=0.01)
    assert math.isnan(late.value) and (late.low, late.high) == (0, np.inf)
    assert late.note.endswith(
        "2 of 2 runs of fa never reached the target; 1 of 2 runs of bp never reached the target"
    )
    with pytest.raises(ValueError, match=r'at is 0.5; expected "shared", "best" or one of 0.01, '):
        made.ratio("fa", "bp", at=0.5)
    with pytest.raises(NotTestable, match="mine is not in the study"):
        made.ratio("mine", "bp")


def test_identical_samples_give_a_point():
    made = make_study(noise=0.1)
    for at_rate in ("shared", "best", 1.0):
        found = made.ratio("fa", "fa", at=at_rate)
        assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_an_edge_of_the_grid_is_flagged_and_never_refused():
    made = again(by_hand([row for row in RUNS if row[1] < 1]))
    found = made.ratio("fa", "bp", at="best")
    assert found.value == pytest.approx(2.0)
    assert found.note == (
        "the best rate of fa, 0.1, lies at the edge of the grid; "
        "the best rate of bp, 0.1, lies at the edge of the grid"
    )
    assert made.summary()["best_rate_at_edge"].tolist() == [True, True]
    alone = by_hand([row for row in RUNS if row[1] == 0.1])
    assert alone.ratio("fa", "bp", at="best").note == ""


def test_a_censored_run_makes_the_ratio_a_bound():
    made = make_study(noise=0.02)
    made.runs.loc[at(made, "fa", 0.01, seeds=[2]), "steps_to_target"] = NAN
    found = again(made).ratio("fa", "bp")
    assert found.high == np.inf and found.low > 1.4
    assert found.note == "a lower bound: 1 of 10 runs of fa never reached the target"
    upside_down = again(made).ratio("bp", "fa")
    assert upside_down.low == 0 and upside_down.high == pytest.approx(1 / found.low)


def test_periods_are_kept_apart():
    study = make_study({("sign", 10): 7.0, "sign": 0.5}, noise=0.0, periods=(100, 10))
    assert study.ratio("sign", "sign", periods=(10, 100)).value == pytest.approx(14.0)
    assert study.ratio("sign", "sign", periods=(None, 10)).value == pytest.approx(1.0)
    with pytest.raises(NotTestable, match="sign with period 1 is not in the study"):
        study.ratio("sign", "bp", periods=(1, None))


# Summary


def test_summary_against_a_table_worked_out_by_hand():
    table = by_hand().summary().set_index("method")
    assert table["test_accuracy"].tolist() == pytest.approx([0.90, 0.80])
    half = 12.7062 * 0.01  # t(0.975, 1) from a table, times the standard error
    assert table.loc["bp", "test_accuracy_high"] == pytest.approx(0.90 + half, rel=1e-5)
    assert table["steps_to_target"].tolist() == pytest.approx([800**0.5, 3200**0.5])
    assert table.loc["fa", ["ratio", "ratio_low", "ratio_high"]].tolist() == pytest.approx(
        [2.0] * 3
    )
    assert np.isnan(table.loc["bp", "ratio"])
    assert table["diverged"].tolist() == [0, 1] and table["runs"].tolist() == [6, 6]
    assert not table["best_rate_at_edge"].any()
    assert table["fewest_steps"].tolist() == pytest.approx([5, 3200**0.5])
    assert table["fastest_rate"].tolist() == [1.0, 0.1]
    assert table["censored"].tolist() == [0, 0]


def test_censored_runs_count_as_if_they_arrived_at_the_last_step():
    for broken in ({"steps_to_target": [40, NAN]}, {"diverged": [False, True]}):
        row = by_hand(changed("fa", 0.1, **broken)).summary().set_index("method").loc["fa"]
        assert row["censored"] == 1
        assert row["ratio"] == pytest.approx((40 / 20 * 100 / 40) ** 0.5)
        assert (row["ratio_low"], row["ratio_high"]) == (0, np.inf)  # one of two is too many


def test_periods_have_rows_of_their_own_and_base_keeps_the_smallest():
    rows = [("sign" if row[0] == "fa" else row[0], *row[1:]) for row in RUNS]
    made = by_hand(rows, periods={"sign": (5, 50)})
    table = made.summary()
    assert table[["method", "period"]].to_numpy().tolist() == [["bp", 0], ["sign", 5], ["sign", 50]]
    assert table["ratio"].tolist()[1:] == pytest.approx([2, 2])
    assert made.at_smallest_periods(table)["period"].tolist() == [0, 5]


def test_nothing_to_compare_gives_nan_not_a_crash():
    table = by_hand([row for row in RUNS if row[1] == 0.01]).summary()
    assert table[["steps_to_target", "ratio", "fewest_steps"]].isna().all(axis=None)
    assert table["test_accuracy"].notna().all()


@pytest.mark.parametrize("case", made_up.BAD_CASES)
def test_odd_studies_have_summaries_and_verdicts(case):
    made = made_up.comparison(
        **{"methods": ("bp", "fa", "sign"), "seeds": 3, **made_up.BAD_CASES[case]}
    )
    for study in (made, made_up.break_everything(made)):
        assert len(study.summary()) == sum(len(of["periods"]) for of in study.methods.values())
        assert len(study.judge()) == 8


def test_metrics_are_those_of_test_data_if_there_are_any():
    made = made_up.comparison(("bp",), seeds=2)
    assert made.metrics == ["test_accuracy", "test_loss"]

    def without(prefix, study):
        return again(study, runs=study.runs.drop(columns=study.runs.filter(like=prefix).columns))

    valid = without("test_", made)
    assert valid.metrics == ["validation_accuracy", "validation_loss"]
    valid.record["protocol"] |= {"select": "train_loss", "maximise": False}
    bare = without("validation_", valid)
    assert bare.metrics == ["train_loss"]
    assert bare.best_rate("bp") == bare.summary()["best_rate"].item()


# Tables


def test_tables_are_read_by_rate_and_seed_whatever_their_order():
    study = make_study()
    fa = study.grid("fa")
    assert fa.values.shape == (3, 10)
    rows = study.rows("runs", "fa", 0.1)
    np.testing.assert_array_equal(fa.values[1], np.log(rows["steps_to_target"]))
    np.testing.assert_array_equal(fa.score[1], rows["validation_accuracy"])
    assert fa.best_rate_index == 1
    mixed = {name: getattr(study, name).sample(frac=1, random_state=0) for name in TABLES}
    mixed = again(study, **mixed)
    for ours, theirs in zip(mixed.grid("fa"), fa, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    column = "error_angle/Dense_0/kernel"
    of_fa = study.rows("evaluations", "fa", 0.1)
    for end, step in ((False, 0), (True, 5000)):
        np.testing.assert_array_equal(
            mixed.measured(column, "fa", 0.1, end=end), of_fa.loc[of_fa["step"] == step, column]
        )


def test_what_was_not_measured_is_nan():
    study = make_study()
    assert np.isnan(study.measured("error_angle/none", "fa", 0.1, end=True)).all()
    kept = study.evaluations[study.evaluations["seed"] != 3]
    angles = again(study, evaluations=kept).measured(
        "error_angle/Dense_0/kernel", "fa", 0.1, end=True
    )
    assert np.isnan(angles).tolist() == [seed == 3 for seed in range(10)]


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"metric is 'f1'; expected a column of runs: method, "):
        make_study().grid("fa", metric="f1")


# Files


def write(made, path):
    (path / "study.json").write_text(json.dumps(made.record))
    for name in TABLES:
        getattr(made, name).to_parquet(path / f"{name}.parquet")


def test_a_directory_gives_back_what_was_written(tmp_path):
    made = made_up.comparison(("bp", "fa", "sign"), seeds=3)
    write(made, tmp_path)
    read = comparison.load(tmp_path)
    assert read.path == tmp_path and read.record == made.record
    pd.testing.assert_frame_equal(read.summary(), made.summary())
    assert repr(read.judge()) == repr(made.judge())  # p may be NaN
    assert read.at_target(1.0).target_loss == 1.0


def test_print_shows_the_table_of_methods():
    found = by_hand()
    lines = str(found).splitlines()
    assert lines[0].strip() == "digits, 2 seeds, 95 % intervals"
    assert max(map(len, lines)) <= 80 and not any(line != line.rstrip() for line in lines)
    assert any(line.startswith("FA, fixed feedback") for line in lines)
    assert "> marks a bound" not in str(found)  # no run is censored at the shared rate
    assert repr(found) == "<Comparison of bp, fa on digits with 2 seeds>"
