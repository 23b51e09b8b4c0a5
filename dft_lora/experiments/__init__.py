"""Whole experiments, from training to report; each resumes where it was stopped."""
