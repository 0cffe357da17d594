"""The systems that `benchmarks.peers` times, one file and one process each.

`link` is the parent's end, `chart` its figure. The workers (`ours`, `plain_torch`, `bio_torch`)
import their own system, NumPy and, of this folder, what needs no more than these (`protocol`), so
that they run in any environment.
"""
