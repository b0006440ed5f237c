"""What the files of a kit say to the administrator who opens it."""

from __future__ import annotations

_README = """\
The kit of {whose} in a Coterie federation.

Secret, for this party alone: everything in {secrets}.
Public: kit.toml, ca.pem, parties.json, tls/chain.pem.
Keep a copy of the whole folder in a safe place: nobody else has these keys, and lost ones cannot be made again.

Next:
{steps}
"""

_STEPS = {
    "coordinator": """\
  1. Bring this folder to the server, and start: coterie server --kit {name}
  2. Shut a party out, at once and without a restart: coterie provision deny NAME --kit {name}
""",
    "site": """\
  1. Say in site.toml where your data is (`coterie data check` reads it), and what you take part in:
     coterie policy init --out policy.toml
  2. coterie client --kit {name}
""",
    "operator": """\
  1. coterie submit run.toml --kit {name}
""",
    "authority": """\
  1. Take this folder off the network, onto a medium that you lock away. The federation runs without it: the server's
     kit holds an issuer that signs certificates. Only this folder can make another issuer.
  2. To add parties to federation.toml later, put it back and run `coterie provision` again.
""",
}

_SECRETS = {
    "coordinator": "identity/, tls/private.pem, issuer/",
    "site": "identity/, tls/private.pem",
    "operator": "identity/, tls/private.pem",
    "authority": "root/ and issuer/",
}

_SITE_TOML = """\
# The data of {name}. This file never travels; the server learns the name `records`, and nothing else that is in here.
# `coterie data check records --site site.toml` reads the data and tells what it found. Paths start from this folder.

# [data.records]
# source = "csv:records.csv"          # or parquet:, npz:, images:, text:
# label = "outcome"                   # column with the class
# features = ["age", "heart_rate"]    # input columns, in this order: the same at every site
# classes = ["survived", "died"]      # all of them, in their order: nothing is counted to find them
# entity = "patient_id"               # all rows of one patient are protected together
# means = [60, 80]                    # public constants, the same at every site
# scales = [15, 20]
"""


def readme(role: str, name: str) -> str:
    """What is in a kit, what is secret, and what comes next."""
    whose = {"coordinator": "the coordinator", "authority": "the authority"}.get(role, f"{role} `{name}`")
    return _README.format(whose=whose, secrets=_SECRETS[role], steps=_STEPS[role].format(name=name).rstrip())


def site_toml(name: str) -> str:
    """A registry of data with every line commented out."""
    return _SITE_TOML.format(name=name)
