"""Measurements, one runnable module per question: ``python -m benchmarks.step_latency --help``.

``harness.py`` holds what they share. Nothing in the package imports from here.
"""
