"""Three servers behind balancers: restarted in turn, killed, placed by adapter. `make fleet` runs the long form."""
