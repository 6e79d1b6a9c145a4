"""UniPO: policy optimization from any mix of data."""
