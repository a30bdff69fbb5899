"""Training methods: compositions of the parts in :mod:`server_hub.methods.method`."""
