"""The claims that `soap-jax study` tests, with bounds that were fixed before any run."""

from soap_jax.study.claims import Claim
from soap_jax.study.contrasts import INF, ErrorAngleTrend, FinalAngle, Ratio, Trend

WITHIN_10_PERCENT = (1 / 1.1, 1.1)


def _claim(key, statement, *tests):
    return Claim(key, statement, tests, sgd_only=True)


CLAIMS = (
    _claim(
        "1",
        "Fixed random feedback (FA) needs about twice backprop's steps",
        Ratio("fa", "bp", within=(1.5, 3.0), matched=False),
    ),
    _claim(
        "2",
        "Raw sign sync needs far fewer steps than backprop",
        Ratio("sign", "bp", within=(0.0, 0.8), matched=False),
    ),
    _claim(
        "3",
        "That gain is the amplified learning rate of the hidden layers",
        Ratio("sign", "bp_scaled_live", within=(0.9, INF), amplification=True),
        Ratio("sign_norm", "bp", within=(0.9, INF)),
    ),
    _claim(
        "4",
        "Keeping magnitudes loses the gain, and steps follow the initial angle",
        Ratio("sign_preserve", "bp", within=(0.95, INF)),
        Trend(("bp", "sign_norm", "sign_preserve", "fa")),
    ),
    _claim(
        "5",
        "Tuning one global rate per method does not undo it",
        Ratio("fa", "bp", within=(1 / 1.25, 1.25), at="best"),
        Ratio("sign", "bp", within=(0.0, 1.0), at="best"),
        Ratio("sign", "bp_scaled_live", within=WITHIN_10_PERCENT, at="best"),
    ),
    _claim(
        "6",
        "The sync period hardly matters",
        *(
            Ratio(method, method, within=WITHIN_10_PERCENT, periods=(period, 1))
            for method in ("sign", "sign_preserve")
            for period in (10, 100)
        ),
    ),
    _claim("7", "Alignment emerges under FA", FinalAngle("fa", within=(-INF, 75.0))),
    _claim("7b", "Alignment is best near the output", ErrorAngleTrend("fa")),
)
