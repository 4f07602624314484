"""Scores of an adapter or a backbone: generated answers, likelihoods."""
