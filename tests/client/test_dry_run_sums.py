"""What a site's administrator is told of a run under secure aggregation before anything leaves."""

import json
from dataclasses import replace

import pytest

from client.dry_run import dry_run
from client.dry_run_text import lines
from client.policy_tables import SecureAggregation
from client.resources import site_resources
from common.kit import load_kit
from tests.helpers.agents import configuration, copied, make_kits

SUMS = ("privacy.secure_aggregation=true", 'data.sites=["cleveland","hungary","switzerland","va-long-beach"]')


@pytest.fixture
def site(tmp_path):
    make_kits(tmp_path / "made")
    return site_resources(load_kit(copied(tmp_path / "made", tmp_path / "kits") / "cleveland", role="site"))


def test_the_masked_update_is_told_with_its_size_and_what_can_be_read(site):
    """38 parameters, the training loss and the weight, four bytes each; sums of three or four, and what they tell."""
    told = dry_run(configuration(*SUMS), site)["release"]
    assert told["update_bytes"] == 4 * (38 + 2)
    assert (told["sums"]["fewest"], told["sums"]["members"]) == (3, 4)
    assert told["clear"] == []
    assert any("experimental" in text for text in told["sums"]["warnings"])


def test_fewer_bits_make_less_leave(site):
    """Twenty bits a value."""
    told = dry_run(configuration(*SUMS, "secagg.bits=20", "strategy.weighting=equal"), site)["release"]
    assert told["update_bytes"] == 40 * 20 // 8


def test_in_words_it_is_no_model_that_leaves(site):
    """But a masked update."""
    text = "\n".join(lines(dry_run(configuration(*SUMS), site)))
    for part in ("the update, masked (160 bytes)", "and one site that helps it can read sums only, of 3 to 4 updates",
                 "keys for 16 rounds", "experimental"):  # fmt: skip
        assert part in text
    assert "the updated model" not in text


def test_noise_of_its_own_makes_the_update_longer(site):
    """Padded to a power of two, which the rotation needs."""
    private = ("privacy.unit=client", "privacy.noise_multiplier=1")
    told = dry_run(configuration(*SUMS, *private), site)
    assert told["release"]["update_bytes"] >= 4 * 64
    assert told["privacy"]["trust"] == "cohort"


def test_too_few_sites_are_a_reason_not_to_join(site):
    """A sum of two is no sum."""
    two = ("privacy.secure_aggregation=true", 'data.sites=["cleveland","hungary"]')
    told = dry_run(configuration(*two), site)
    assert not told["joins"]
    assert any("too few" in reason for reason in told["reasons"])


def test_it_says_whom_sums_hide_updates_from(site):
    """Keys that came through the coordinator make another claim, or no sum, as the site's policy says."""
    text = "\n".join(lines(dry_run(configuration(*SUMS), site)))
    assert "the sites' keys were agreed without it" in text
    assert "no sum with" not in text
    (hungary,) = (record for record in site.kit.sites.values() if record.name == "hungary")
    unconfirmed = site.kit.folder / "unconfirmed.json"
    unconfirmed.write_text(json.dumps({"format": 1, "key_ids": [hungary.key_id.hex()]}))
    text = "\n".join(lines(dry_run(configuration(*SUMS), site)))
    assert "no sum with hungary" in text
    lenient = site.policy.model_copy(update={"secure_aggregation": SecureAggregation(require_pins=False)})
    text = "\n".join(lines(dry_run(configuration(*SUMS), replace(site, policy=lenient))))
    assert "unless it exchanged keys" in text
    assert "no sum with" not in text
