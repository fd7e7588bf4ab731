"""What multi-LoRA costs inside vLLM: no LoRA, vLLM's LoRA and lorakern's LoRA in turns: `python -m benchmarks.serving`.

workload.py says what is served, worker.py is an engine in a process of its own, session.py lets the engines take turns;
figures.py turns times into figures, report.py and page.py show them. Only worker.py needs vLLM.
"""
