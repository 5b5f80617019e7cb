"""What answers queries during an upgrade: galleries of two models, and lists of results made one."""
