"""Diagnostics of learned losses and of training, for any model and any loss."""
