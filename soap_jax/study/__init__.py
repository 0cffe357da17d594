"""The comparison of feedback alignment, sign synchronisation and backpropagation.

`config` says what is run, `methods` what is compared, `experiment` trains it, `results` keeps it,
`summary` draws conclusions from the kept results alone, and `figures` plots them.
"""
