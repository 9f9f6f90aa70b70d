"""The HTTP interface: routes, what stands before them, and what requests and answers look like."""
