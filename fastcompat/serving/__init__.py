"""Serving a gallery that is on its way between models: searches, calibrated merges, bounded regret."""
