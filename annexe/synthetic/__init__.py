"""Synthetic egocentric scenes: what is in them, how they are drawn, and what is asked about them."""
