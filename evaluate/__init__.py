"""Honest numbers and search: ranks without sorting, metrics, an index, reports."""
