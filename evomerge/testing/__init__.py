"""Contract suites that every plug-in can run, and the tiny families that the tests search."""
