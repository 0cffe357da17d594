"""The object that `compare` and `load` return: results, their claims and their report."""

from __future__ import annotations

import os
from collections.abc import Sequence

from soap_jax.study import claims as claims_
from soap_jax.study import results, store
from soap_jax.study.claims import Claim, Finding
from soap_jax.study.contrasts import Test


class Comparison(results.Results):
    """The results of a comparison, its claims and its report; `print` shows the table of methods.

    Its tables and estimates are those of `soap_jax.study.results.Results`.
    """

    def __str__(self):
        from soap_jax.study import terminal

        return terminal.as_text(terminal.summary_table(self))

    def __repr__(self):
        title, seeds = self.record["title"], len(self.seeds)
        return f"<Comparison of {', '.join(self.methods)} on {title} with {seeds} seeds>"

    def judge(self, claims: Sequence[Claim | Test] | None = None) -> list[Finding]:
        """Judges claims; by default those that were stored when the study started.

        A finding is exploratory if its claim was not stored then, or had other bounds.
        """
        return claims_.judge(self, claims)

    def report(
        self, path: str | os.PathLike[str], claims: Sequence[Claim | Test] | None = None
    ) -> None:
        """Writes the report.

        Args:
            path: a file such as "report.html", for a page that needs no other file; or a directory,
                which then holds report.html, figures (SVG, PNG, PDF) and tables (CSV).
            claims: as in `judge`.
        """
        from soap_jax.study import report  # imported here, since drawing libraries load slowly

        report.write(self, self.judge(claims), path)


def load(path: str | os.PathLike[str]) -> Comparison:
    """Reads the comparison that `compare` wrote into a directory.

    Raises:
        ValueError: if the directory holds no comparison, an unfinished one, or one of another
            format.
    """
    found = store.Store(path)
    return Comparison(found.record, found.read(), found.path)
