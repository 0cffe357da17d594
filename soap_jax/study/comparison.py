"""What `compare` returns and `load` reads: results, and what one concludes from them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from soap_jax.study import claims as claims_
from soap_jax.study import results, store
from soap_jax.study.claims import Claim, Finding
from soap_jax.study.contrasts import Test


class Comparison(results.Results):
    """What was run and measured (see `soap_jax.study.results.Results`), judged and reported."""

    def judge(self, claims: Sequence[Claim | Test] | None = None) -> list[Finding]:
        """Judges claims, by default those stored when the study started.

        Findings on claims that were not stored, or with other bounds, are exploratory.
        """
        return claims_.judge(self, claims)

    def report(
        self, path: str | os.PathLike[str], claims: Sequence[Claim | Test] | None = None
    ) -> None:
        """Writes the report.

        Args:
            path: of the page, such as "report.html", which needs no other file; or a directory, for
                report.html, figures (SVG, PNG, PDF) and tables (CSV).
            claims: as in `judge`.
        """
        from soap_jax.study import report  # here, since what draws takes a while to import

        report.write(self, self.judge(claims), path)


def load(path: str | os.PathLike[str]) -> Comparison:
    """Reads what `compare` wrote into a directory.

    Raises:
        ValueError: if there is none, it is not finished, or another version wrote it.
    """
    found = store.Store(path)
    return Comparison(found.record, found.read(), found.path)
