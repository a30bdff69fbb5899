"""Methods that only simulations offer, to compare with."""
