"""The fault harness: `python -m tests.faults` breaks what can break and counts what was lost.

An `Experiment` is one promise of the house and a function of a seed that could refute it. Its batches run in
forked processes with a deadline, are appended to a ledger, and are summed up in one table and in
docs/reliability.md. One file each group of experiments; `experiments.py` lists them.
"""
