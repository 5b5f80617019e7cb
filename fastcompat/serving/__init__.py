"""What answers queries during an upgrade: galleries of several models, and lists of results made one."""
