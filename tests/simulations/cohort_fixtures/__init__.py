"""Clients of a user, some of which cannot be made, or take their process with them."""
