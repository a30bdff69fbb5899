"""The way into the hub: websockets, tokens, sessions, blobs, limits and traffic."""
