"""The load generator. It knows a server by its public contract alone."""
