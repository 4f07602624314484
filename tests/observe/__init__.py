"""Debian's Prometheus and Alertmanager on a real server under load, with the shipped rules and dashboard."""
