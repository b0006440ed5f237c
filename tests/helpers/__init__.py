"""Shared parts of tests: small real federations, runs over them, and processes that are interrupted."""
