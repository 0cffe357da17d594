"""The causal diagram has the mediation's numbers on its arrows."""

import dataclasses

import numpy as np
import pytest
from made_up import UNKNOWN, make_mediation, make_study

from soap_jax.study import diagram


@pytest.fixture(scope="module")
def study():
    return make_study(seeds=2, methods=("bp", "sign"), learning_rates=(0.05, 0.1))


def test_the_causal_diagram_says_how_much_goes_where(study):
    made, tables = study
    causes = diagram.describe(made, tables, make_mediation())
    assert causes.boxes[-1].lines == ("steps to loss 0.5", "*in all × 0.230 [0.220, 0.240]*")
    rule_to_rate, rule_to_direction, rate, direction = causes.arrows
    assert rule_to_rate.lines[0].startswith("× 9.2 (size × 11.5)") and rule_to_direction.lines[
        0
    ].endswith("° off")
    assert rate.lines == ("*× 0.225*", "[0.215, 0.235]", "101 % of it")
    assert rate.width == 5 and direction.width == 1.5
    assert "rate first: × 0.241 [0.230, 0.252] through the rate" in causes.caption


def test_a_bound_in_the_causal_diagram_is_open_on_its_side(study):
    made, tables = study
    effects = make_mediation()
    cut = {"share": np.nan, "share_low": np.nan, "share_high": np.nan, "high": np.inf}
    effects = dataclasses.replace(
        effects, effects=tuple(dataclasses.replace(e, **cut) for e in effects.effects)
    )
    lines = diagram.describe(made, tables, effects).arrows[2].lines
    assert lines == ("*× 0.225*", "[0.215, ∞)")


def test_without_numbers_the_causal_diagram_says_why(study):
    causes = diagram.describe(*study, UNKNOWN)
    assert "sign_norm is not in the study" in causes.empty and not causes.boxes


def test_arrows_point_at_their_ends(study):
    for arrow in diagram.describe(*study, make_mediation()).arrows:
        tip, left, base, right = map(np.array, arrow.head)
        assert tip.tolist() == list(arrow.end)
        assert np.allclose((left + right) / 2, base, atol=0.02)
        along = np.subtract(arrow.end, arrow.start)
        assert abs(np.cross([*along, 0], [*(tip - base), 0])[2]) < 2  # on one line
