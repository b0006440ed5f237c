"""Certificates that the tests of this folder share."""

import pytest

from common.crypto import Authority, generate_tls_key, make_csr


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create("clinics")


@pytest.fixture(scope="session")
def certificate_pem(authority) -> bytes:
    return authority.issuer.issue(generate_tls_key().public_key(), role="site", name="north")


@pytest.fixture(scope="session")
def csr_pem() -> bytes:
    return make_csr(generate_tls_key(), federation="clinics", role="site", name="north")
