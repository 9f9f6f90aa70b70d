"""The HTTP interface: routes, the guard before them, and the forms of requests and answers."""
