"""Data sets that every installation knows by name: their public facts, their defects, and how they are read.

`common.data.catalogue` lists them; nothing else imports them.
"""
