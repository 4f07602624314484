"""`make faults`: faults injected into a real server. Each scenario is a module and a row of the printed table."""
