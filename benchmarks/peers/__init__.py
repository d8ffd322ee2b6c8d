"""The peers, each used as its documentation advises. Nothing here imports `service`."""
