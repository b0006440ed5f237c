"""Ready runs by name: `coterie simulate NAME`. Each is a complete configuration; `[dp]` replaces settings for
privacy.
"""
