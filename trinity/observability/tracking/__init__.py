"""Trackers: other people's programs that are told how a run goes, beside its own log."""
