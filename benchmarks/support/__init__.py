"""What benchmarks share: the harness, what is measured, and other projects' ways."""
