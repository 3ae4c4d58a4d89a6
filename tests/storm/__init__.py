"""A storm: kills, races, damaged files, hostile answers and hostile rewards, with the run that nobody disturbed beside them.

`PYTHONPATH=tests python -m storm` runs what `make storm` does; tests/storm/test_storm.py a little of everything.
"""
