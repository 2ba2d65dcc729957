"""Scores of localization: boxes and maps against the truth."""
