"""Measurements of the engine and the service beside their peers. They are no tests: `make test` asserts no timing."""
