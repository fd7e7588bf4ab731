"""Benchmarks of lorakern, one file per question: `python -m benchmarks`. They need the source checkout.

A file such as decode.py registers cases; runner.py measures them; report.py, plots.py and results.py show them.
"""
