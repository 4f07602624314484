"""The routed path on this CPU."""
