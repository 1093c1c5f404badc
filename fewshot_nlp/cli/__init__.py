"""The command line: settings from YAML and arguments, and the run that every recipe makes."""

import os

# Read once, when torch loads GNU OpenMP. By default a waiting thread spins for about a millisecond, which makes a run
# dozens of times slower as soon as another program wants a core; one that never spins is half as fast on its own.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
