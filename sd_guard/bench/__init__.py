"""What the guard costs: suites of timed cases for one GPU, which run on the CPU as a smoke test."""
