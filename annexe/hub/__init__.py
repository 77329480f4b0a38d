"""Data, weights and runs on the Hugging Face Hub."""
