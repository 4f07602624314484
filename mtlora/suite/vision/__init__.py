"""Suites of images: generated ones with exact labels, and folders of files."""
