"""The command line: settings from YAML and arguments, and the run that every recipe makes."""
