"""Tests of the report; `conftest` makes run folders like those of real runs."""
