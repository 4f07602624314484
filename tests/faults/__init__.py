"""Fault injection against a real server: `make faults`. One scenario a module, each one row of the printed table."""
