"""How commands talk to a running mount: one request and one answer over a socket that only its owner can reach."""
