"""Checks of anybody's MoE functions: cases, truths with bounds, verdicts by name."""
