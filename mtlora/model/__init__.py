"""A frozen backbone with an adapter or a baseline.

language.py     a language backbone
vision.py       a vision encoder
soft_tokens.py  images in the prompts of text tasks
baseline.py     a trained baseline on disk
"""
