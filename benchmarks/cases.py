"""Import every file that registers cases, in the order in which they run. A new question is a file and a line here."""

from benchmarks import decode, prefill, ranks, shapes, gates, backward, dispatch, gpu  # noqa: F401, I001
