"""Records and bytes: what a message looks like between processes. No network here, and never pickle."""
