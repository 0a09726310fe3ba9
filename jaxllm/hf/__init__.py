"""Hugging Face checkpoints: read into our parameters and written back, bit for bit."""
