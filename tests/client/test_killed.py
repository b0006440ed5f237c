"""A site that is killed at any step of a round never has a ledger that says less than was released."""

import json
import subprocess
import sys


def test_killed_at_every_step_a_site_never_under_reports(tmp_path):
    """Each distinct update that left has an event of its own; the site starts again and answers, by itself."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.killed_round", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    courses = json.loads(done.stdout)
    assert len(courses) > 10, "the round has steps to be killed at"
    assert courses[-1]["lived"]
    for course in courses:
        updates = set(course["released"])
        assert course["again"]
        assert all(len(update) == 64 for update in updates), "every restart ends in an update, not in a failure"
        assert 1 <= len(updates) <= course["events"] <= 2
    assert courses[-1]["released"][0] == courses[-1]["released"][1], "a retry resends what was stored"
    assert {course["events"] for course in courses} == {1, 2}, "early kills cost nothing, later ones a round"
