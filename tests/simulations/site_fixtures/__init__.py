"""A user's own models and data, registered in `site.toml`."""
