"""Messages between machines, carried by Flower's SuperLink and SuperNodes (`flwr`, an extra of this package).

The very same `Coordinator` and `Site` as in process: this package only moves bytes. `engine` is the server's side of
that, `server_app` runs a study at the SuperLink, `client_app` hands what comes to a hospital's SuperNode over to the
hospital's own process and back, and `simulation` runs all of it on one machine, over Ray. `secure_grid` and
`secure_mod` put the secure sum under a Flower app that somebody has already.

Nothing here is imported unless a study runs over Flower.
"""
