"""Work on a whole source or a whole store, started from the command line."""
