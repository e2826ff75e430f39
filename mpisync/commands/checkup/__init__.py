"""What `mpisync doctor` looks at: `probing` asks the machine, `examine` judges the answers.

The checks are pure functions of probes, so that each of their sentences can be tested without the machine
that deserves it.
"""
