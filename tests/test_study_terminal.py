"""What the command line shows fits a terminal, and says what its numbers are."""

import dataclasses
import io
import re

import pytest
from made_up import BAD_CASES, break_everything, comparison, make_findings
from rich.console import Console

from soap_jax.study import claims, terminal


@pytest.fixture(scope="module")
def study():
    return comparison(seeds=3)


def shown(renderable, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def flat(renderable):
    return re.sub(r"\s+", " ", shown(renderable, 400))


def test_tables_fit_a_terminal(study):
    for table in (terminal.summary_table(study), terminal.claims_table(make_findings())):
        said = shown(table)
        assert "…" not in said and max(map(len, said.splitlines())) <= 80


def test_a_long_name_takes_nothing_from_the_numbers():
    made = comparison(("bp", "fa"), seeds=2, metric="perplexity")
    made.methods["fa"]["label"] = "a method of my own with a rather long name"
    said = shown(terminal.summary_table(made))
    assert "…" not in said and "perplexity" in said and max(map(len, said.splitlines())) <= 80


def test_the_table_of_methods_has_each_methods_numbers(study):
    columns, rows = terminal.summary_cells(study, full=False)
    row = study.at_smallest_periods(study.summary()).set_index("method").loc["fa"]
    [cells] = [cells for cells in rows if cells[0] == "FA, fixed feedback"]
    said = dict(zip(columns, cells, strict=True))
    assert said["best rate"].rstrip("*") == f"{row['best_rate']:g}"
    assert said["best rate"].endswith("*") == row["best_rate_at_edge"]
    assert said["test accuracy %"].startswith(f"{100 * row['test_accuracy']:.3g} ± ")
    assert said["ratio"].startswith(f"{row['ratio']:#.3g} [")
    [reference] = [cells for cells in rows if cells[0] == "backprop"]
    assert reference[columns.index("ratio")] == "1"


def test_the_full_table_has_every_period_metric_and_fewest_steps(study):
    columns, rows = terminal.summary_cells(study, full=True)
    assert len(rows) == len(study.summary()) and "period" in columns
    assert {"test accuracy %", "test loss", "fewest steps"} <= set(columns)
    assert any(
        re.fullmatch(r"[\d.]+ at [\d.]+", row[columns.index("fewest steps")]) for row in rows
    )


def test_bounds_are_marked(study):
    columns, rows = terminal.summary_cells(study, full=False)
    [late] = [row for row in rows if row[0] == "hidden layers frozen"]
    assert late[columns.index("steps to 0.5")] == "> 340"
    assert late[columns.index("ratio")].startswith("> ")


def test_notes_say_which_rate_is_shared_and_what_chooses_rates(study):
    said = flat(terminal.summary_table(study))
    assert f"at rate {study.shared_rate:g}, the smallest at which every run of backprop" in said
    assert "chosen by validation accuracy" in said and "Feedback is synced every update." in said
    assert "* at the edge of the grid" in said


def test_notes_say_which_method_is_synced_when():
    made = comparison(["bp", "sign", "sign_norm"], seeds=2)
    made.methods["sign"]["periods"] = [10]
    said = flat(terminal.summary_table(made))
    assert "every update (sign sync, norm kept), every 10 updates (sign sync, raw)." in said


@pytest.mark.parametrize("changes", BAD_CASES.values(), ids=BAD_CASES)
def test_small_studies_have_tables(changes):
    made = comparison(**{"seeds": 2, **changes})
    for cells in (terminal.summary_cells(made, full=full) for full in (True, False)):
        assert "nan" not in str(cells)
    assert "nan" not in shown(terminal.summary_table(made)).split()


def test_without_a_shared_rate_the_notes_say_why(study):
    said = flat(terminal.summary_table(break_everything(study)))
    assert "No steps to compare: " in said and "all runs of backprop" in said


def test_the_table_of_claims_says_what_p_is_and_which_test_leaves_a_claim_open():
    said = flat(terminal.claims_table(make_findings()))
    assert "p is the p-value of the verdict, after Holm's correction for 6 claims." in said
    assert "4: Censored." in said and "1: 1.84 lies in." not in said
    assert "1.84 [1.80, 1.88] 1.5 to 3" in said
    assert "xploratory" not in said


def test_exploratory_findings_are_called_so():
    findings = [dataclasses.replace(finding, exploratory=True) for finding in make_findings()]
    said = flat(terminal.claims_table(findings))
    assert "Exploratory: " in said and said.count(" exploratory") == len(findings)


def test_without_claims_there_is_an_empty_table():
    assert "claim" in shown(terminal.claims_table([]))


def test_hostile_words_stay_words(study):
    finding = dataclasses.replace(make_findings()[0], statement="[red]x[/red] [/]")
    assert "[red]x[/red] [/]" in flat(terminal.claims_table([finding]))
    assert claims.HOLDS in flat(terminal.claims_table([finding]))


# Progress


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)


LABELS = {"bp": "backprop", "fa": "FA"}


def test_the_bar_counts_the_runs_of_all_methods_from_the_first_one_on(console):
    with terminal.Progress(console, LABELS) as progress:
        progress.show("bp", None, 4, 0, 8)
        [task] = progress.bar.tasks
        assert task.description == "backprop: compiling" and task.total == 8
        progress.show("bp", 1, 4, 1, 8)
        progress.show("bp", 3, 4, 3, 8)
        [task] = progress.bar.tasks
        assert task.completed == 3 and task.time_remaining is not None
        progress.show("fa", None, 4, 4, 8)
        [task] = progress.bar.tasks
        assert task.description == "FA: compiling" and task.completed == 4


def test_each_method_that_is_done_has_a_line(console):
    with terminal.Progress(console, LABELS) as progress:
        progress.show("bp", 0, 4, 0, 8)
        progress.show("bp", 4, 4, 4, 8)
        progress.show("fa", 2, 4, 6, 8)  # two runs were there already
        progress.show("fa", 4, 4, 8, 8)
    said = console.file.getvalue()
    assert re.search(r"backprop +4 runs in \d+\.\d s", said)
    assert re.search(r"FA +2 runs in \d+\.\d s", said)


def test_a_method_without_new_runs_has_no_line(console):
    with terminal.Progress(console, LABELS) as progress:
        progress.show("bp", 4, 4, 4, 8)
    assert "runs in" not in console.file.getvalue()


def test_nothing_is_said_of_a_method_that_an_error_stopped(console):
    with (
        pytest.raises(RuntimeError, match="stop"),
        terminal.Progress(console, LABELS) as progress,
    ):
        progress.show("bp", 0, 4, 0, 8)
        progress.show("bp", 2, 4, 2, 8)
        raise RuntimeError("stop")
    assert "runs in" not in console.file.getvalue()
