"""Acting in environments: collecting, remembering, recording, evaluating."""
