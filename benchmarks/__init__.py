"""The benchmark suite: ``python -m benchmarks``. Measures the broker from outside; the package never imports it."""
