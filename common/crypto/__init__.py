"""Identities, certificates and the sealed container."""
