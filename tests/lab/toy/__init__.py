"""The least that an experiment is: what a newcomer writes, and the contract tests run."""
