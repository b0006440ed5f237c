"""Figures: `python -m simulations.benchmarks NAME --json` prints one JSON document.

`reference` holds the workloads and the plain torch loops that figures are divided by; it is never edited. A benchmark
interleaves its own rounds with the loop's in the same run, reports ratios, and prints a figure only if both ended
with the same weights.
"""
