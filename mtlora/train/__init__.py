"""Training adapters and baselines beside a frozen backbone; `trainer.py` reads from top to bottom.

diagnosis.py measures how a trained adapter routes tokens and uses its experts.
"""
