"""The parts of the experiment that `examples/upgrade_omniglot.py` runs."""
