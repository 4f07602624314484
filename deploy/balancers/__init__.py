"""Configurations of balancers in front of several servers."""
