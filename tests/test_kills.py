"""A run that is killed again and again, and resumed each time, ends as an unbroken one. kills.py kills more often."""

from kills import kill_many


def test_a_run_killed_again_and_again_ends_as_an_unbroken_one(tmp_path):
    places = kill_many(tmp_path, kills=4)
    assert sum(places.values()) == 4 and len(places) > 1
