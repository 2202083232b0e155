"""Rows in, Hugging Face checkpoints out."""
