"""Accuracy per FLOP of one training with this library, next to what others do with the same budget.

``python -m benchmarks.quality --help`` says how to run it; ``task.py`` and ``competitors.py`` what runs.
"""
