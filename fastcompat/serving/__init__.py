"""What answers queries during an upgrade: galleries of several models, and their results made one list."""
