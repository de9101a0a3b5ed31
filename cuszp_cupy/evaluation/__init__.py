"""What ``bench.py`` runs: sample data, timing, the measurements and their tables. Imports without CuPy."""
