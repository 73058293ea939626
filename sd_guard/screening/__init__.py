"""Screening: a list of prompts in, a run folder of records and images out."""
