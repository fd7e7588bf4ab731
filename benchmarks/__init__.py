"""Benchmarks of lorakern, one file per question."""
