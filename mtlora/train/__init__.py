"""Training adapters and baselines beside a frozen backbone; `trainer.py` reads from top to bottom.

diagnosis.py says what a trained adapter does inside.
"""
