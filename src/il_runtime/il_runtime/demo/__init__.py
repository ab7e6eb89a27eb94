"""`make demo`: from nothing to a policy that moves an arm, in numbered stages that survive interruption."""
