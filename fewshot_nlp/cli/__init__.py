"""The command line: settings from YAML and arguments, and the run that every recipe makes."""

import os

# Read once, when torch loads OpenMP. Threads that spin while they wait make a run dozens of times slower as soon as
# another program wants one of the cores; threads that sleep cost next to nothing on a machine of one's own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
