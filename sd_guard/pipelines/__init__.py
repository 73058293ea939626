"""Guarded diffusers pipelines: a file a pipeline."""
